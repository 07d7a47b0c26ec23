"""Mapped weights beside ComfyUI's own loading, one process of ComfyUI and no pool."""
