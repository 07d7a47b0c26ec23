"""Whether to run what takes long: more families, meshes and sizes, and the same on every ComfyUI."""

from __future__ import annotations

import os

LARGE = os.environ.get("RAYLIGHT_TEST_LARGE", "0") != "0"
WHY = "slow: RAYLIGHT_TEST_LARGE=1 runs it"
"""Why something was skipped."""
