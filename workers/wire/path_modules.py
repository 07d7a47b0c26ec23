"""Modules that ComfyUI names by their path: how a worker finds them, and how values refer to them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from ...raylight.errors import UnsupportedError

log = logging.getLogger(__name__)


class PathModules(importlib.abc.MetaPathFinder):
    """Imports modules by the names ComfyUI gives to node files: their path, dots written as `_x_`.

    A patch that is an instance of a node pack's class is pickled by reference to such a name. Modules inside of a pack
    have its name, a dot and their own; Python finds them once the pack is a package.

    Args:
        prepare: called before a node file or a pack's own code runs.
    """

    def __init__(self, prepare: Callable[[], None] = lambda: None) -> None:
        self.prepare = prepare

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


class Bare(ModuleType):
    """The package of a node pack whose own code has not run.

    That code imports all nodes of the pack, registers pages with ComfyUI's server, and may read and write settings:
    a worker wants one module of it.
    """


def reference(value: Any) -> tuple[Any, ...] | None:
    """How to pickle such a module, or a function or class of it, by name; None for all others.

    pickle itself imports by name, which fails where the path has a dot: it takes what is before for a package.
    """
    if isinstance(value, ModuleType):
        if os.path.isabs(value.__name__):
            return module, (value.__name__,)
        # cloudpickle knows plain modules only; those of torch's settings are of a class of their own
        special = type(value) is not ModuleType and sys.modules.get(value.__name__) is value
        return (importlib.import_module, (value.__name__,)) if special else None
    if not isinstance(value, (types.FunctionType, type)):
        return None
    name, path = getattr(value, "__module__", None), value.__qualname__
    if not isinstance(name, str) or not os.path.isabs(name) or name not in sys.modules or "<locals>" in path:
        return None
    return (resolve, (name, path)) if _attribute(sys.modules[name], path) is value else None


def resolve(name: str, path: str) -> Any:
    """The object `path` of the module with that path-like name, which is loaded where it is not yet."""
    return _attribute(module(name), path)


def module(name: str) -> ModuleType:
    """The module with that path-like name: one of a pack alone if that works, else with the pack's own code.

    Raises:
        UnsupportedError: there is none, or it cannot be imported here.
    """
    found = sys.modules.get(name)
    if found is not None and not isinstance(found, Bare):
        return found
    head = _head(name)
    try:
        if isinstance(sys.modules[head], Bare):
            if head != name:
                try:
                    return importlib.import_module(name)
                except Exception as error:
                    log.info("%s wants the rest of its pack: %s: %s", name, type(error).__name__, error)
            _execute(head)
        return importlib.import_module(name)
    except Exception as error:
        raise UnsupportedError(
            f"The node pack {os.path.basename(head)} cannot be used on the workers",
            f"its module {name.removeprefix(head).lstrip('.') or '__init__'} cannot be imported there: "
            f"{type(error).__name__}: {error}",
            "Remove its node from the workflow",
        ) from error


def _head(name: str) -> str:
    """The name of the node file, or of the pack, that a module is of; it is in sys.modules afterwards."""
    head = name
    while head not in sys.modules:
        spec = PathModules().find_spec(head)
        if spec is None:
            head, dot, _ = head.rpartition(".")
            if dot:
                continue
            raise UnsupportedError(
                "A node whose file is not on this machine was to run on a worker",
                name,
                "Install the node there as well",
            )
        made = importlib.util.module_from_spec(spec)
        made.__class__ = Bare
        sys.modules[head] = made
    return head


def _execute(head: str) -> None:
    """Run a node file, or a pack's own code, as ComfyUI does; a file without the server first, as most need none."""
    found = sys.modules[head]
    found.__class__ = ModuleType
    assert found.__spec__ is not None and found.__spec__.loader is not None
    run = found.__spec__.loader.exec_module
    try:
        if not hasattr(found, "__path__"):
            try:
                return run(found)
            except Exception as error:
                log.info("%s wants ComfyUI's server: %s: %s", head, type(error).__name__, error)
        next((each for each in sys.meta_path if isinstance(each, PathModules)), PathModules()).prepare()
        return run(found)
    except BaseException:
        del sys.modules[head]
        raise


def _attribute(module: ModuleType, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    return value
