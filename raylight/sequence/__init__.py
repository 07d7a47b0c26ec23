"""Sequence parallelism: tokens and heads of one model call over ulysses x ring ranks. Runs in a worker."""
