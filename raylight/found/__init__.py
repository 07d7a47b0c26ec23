"""A plan that nobody wrote: found by tracing a model, and proved on ranks that are threads."""
