"""Ray and processes, and no model: a pool's start, life, calls and faults. In ComfyUI's process, but for actor.py."""
