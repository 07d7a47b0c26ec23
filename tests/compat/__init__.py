"""What of the pack works with a ComfyUI, as rows of a table: the parts of benchmarks/compat.py."""
