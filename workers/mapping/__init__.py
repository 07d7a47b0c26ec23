"""ComfyUI's loader over a mapped file: on meta in ComfyUI's process, on a device in a worker."""
