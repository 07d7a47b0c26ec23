"""A VAE on a worker: a strip of rows, or tiles that are dealt out."""
