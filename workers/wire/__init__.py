"""What crosses between ComfyUI's process and a worker, and how: messages, tensors, modules. Runs in both."""
