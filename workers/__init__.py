"""Everything Ray, and everything that touches ComfyUI on a device: the pool, its workers, and what crosses between."""
