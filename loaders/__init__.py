"""Weight files without trust and without copies: checked headers, quantised blocks, and tensors as parts of a file."""
