"""Modules that ComfyUI names by their path: how a worker finds them, and how values refer to them."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class PathModules(importlib.abc.MetaPathFinder):
    """Imports modules by the names ComfyUI gives to node files: their path, dots written as `_x_`.

    A patch that is an instance of a node pack's class is pickled by reference to such a name.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not os.path.isabs(fullname):
            return None
        plain = fullname.replace("_x_", ".")
        for candidate in (plain, plain + ".py", os.path.join(plain, "__init__.py")):
            if os.path.isfile(candidate):
                package = [os.path.dirname(candidate)] if candidate.endswith("__init__.py") else None
                return importlib.util.spec_from_file_location(fullname, candidate, submodule_search_locations=package)
        return None


def reference(value: Any) -> tuple[Any, ...] | None:
    """How to pickle a function or class of such a module by name; None for all others.

    pickle itself imports by name, which fails where the path has a dot: it takes what is before for a package.
    """
    if not isinstance(value, (types.FunctionType, type)):
        return None
    name, path = getattr(value, "__module__", None), value.__qualname__
    if not isinstance(name, str) or not os.path.isabs(name) or name not in sys.modules or "<locals>" in path:
        return None
    return (resolve, (name, path)) if _attribute(sys.modules[name], path) is value else None


def resolve(name: str, path: str) -> Any:
    """The object `path` of the module with that path-like name, which is loaded where it is not yet."""
    if name not in sys.modules:
        spec = PathModules().find_spec(name)
        if spec is None or spec.loader is None:
            raise ModuleNotFoundError(f"there is no module file for {name}", name=name)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return _attribute(sys.modules[name], path)


def _attribute(module: ModuleType, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
