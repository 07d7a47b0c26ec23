"""What runs in ComfyUI's process: the MODEL without weights, what it refuses, what it sends, and what is told of it."""
