"""The test host: a real ComfyUI in an environment of its own, small real checkpoints, and a client."""
