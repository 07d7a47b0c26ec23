"""Which cards share a run: its work, what it costs, and what is best. Runs in ComfyUI's process."""
