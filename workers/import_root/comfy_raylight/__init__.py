"""The one name under which ComfyUI, Ray workers and tests import this pack: its sub-packages are the pack's folders."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[3])]
