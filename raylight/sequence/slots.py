"""Where a call carries an argument: looked up by index, since binding a signature per call would be slow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import PlanError


@dataclass(frozen=True)
class Slot:
    """An argument of a function, or one element of it.

    Attributes:
        name: its keyword; "" for a positional argument without one.
        index: its position; None where it is only taken by keyword.
        element: index into the argument, a tuple or list; None for the argument itself.
    """

    name: str
    index: int | None
    element: int | None = None

    @classmethod
    def find(cls, function: Callable[..., Any], path: str | int) -> Slot | None:
        """The slot of an argument "name", of an element "name.0" or of a position; None where there is none."""
        if isinstance(path, int):
            return cls("", path)
        name, _, element = path.partition(".")
        rest = int(element) if element else None
        for index, parameter in enumerate(inspect.signature(function).parameters.values()):
            if parameter.kind is parameter.VAR_KEYWORD:
                return cls(name, None, rest)
            if parameter.name == name:
                return cls(name, None if parameter.kind is parameter.KEYWORD_ONLY else index, rest)
        return None

    @classmethod
    def need(cls, module: nn.Module, path: str | int) -> Slot:
        """Like `find`, for a module's forward.

        Raises:
            PlanError: it has no such argument.
        """
        slot = cls.find(module.forward, path)
        if slot is None:
            raise PlanError(f"{type(module).__name__} has no argument {path}", "the plan is for another version of it")
        return slot

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument's value; None where the call leaves it out."""
        value = self._argument(args, kwargs)
        return value if self.element is None or value is None else value[self.element]

    def write(self, args: list[Any], kwargs: dict[str, Any], value: Any) -> None:
        """Put a value in its place; a tuple or list that holds it is replaced by a new one."""
        if self.element is not None:
            holder = self._argument(args, kwargs)
            items = list(holder)
            items[self.element] = value
            value = type(holder)(items)
        if self.index is not None and self.index < len(args):
            args[self.index] = value
        else:
            kwargs[self.name] = value

    def _argument(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.index is not None and self.index < len(args):
            return args[self.index]
        return kwargs.get(self.name)


def modules(root: nn.Module, path: str) -> list[nn.Module]:
    """The modules at a path of names, where "*" stands for all children; "" is the root.

    Raises:
        PlanError: there is none.
    """
    found = [root]
    for name in path.split(".") if path else ():
        if name == "*":
            found = [child for module in found for child in module.children()]
        elif not all(isinstance(getattr(module, name, None), nn.Module) for module in found):
            raise PlanError(f"{type(root).__name__} has no module {path}", "the plan is for another version of it")
        else:
            found = [getattr(module, name) for module in found]
    return found
