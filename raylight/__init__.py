"""The engine: sequence parallelism as a declaration. Needs torch and the standard library only."""
