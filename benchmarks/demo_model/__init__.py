"""The demo's own world, and how its small model, LoRA and VAE are trained: `python benchmarks/train_demo.py`."""
