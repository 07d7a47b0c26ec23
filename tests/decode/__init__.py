"""Decoding in strips and by tiles, on forked ranks with ComfyUI's own classes."""
