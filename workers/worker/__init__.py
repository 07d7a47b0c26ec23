"""What runs in a worker: its verbs, the model, its weights, recorded and compiled calls."""
