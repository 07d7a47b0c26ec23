"""ComfyUI's page in a browser that nobody sees."""
