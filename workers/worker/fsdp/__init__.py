"""Weights of a model's blocks in parts, of which each worker has its own. Runs in a worker."""
