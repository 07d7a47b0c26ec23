"""One plan per model family: where its tokens are, and nothing else."""
