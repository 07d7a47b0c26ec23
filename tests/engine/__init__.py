"""The engine on real ranks over gloo: collectives by themselves, and ComfyUI's model classes against one process."""
