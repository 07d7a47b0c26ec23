"""A node pack that reaches into models, with its nodes in a file of their own, as most packs have them."""

from __future__ import annotations

from .caches import RLTestCache
from .inside import RLTestInside, RLTestTable

NODE_CLASS_MAPPINGS = {"RLTestCache": RLTestCache, "RLTestInside": RLTestInside, "RLTestTable": RLTestTable}
