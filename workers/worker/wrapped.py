"""A worker's side of functions that nodes put around a model call: they run here, where what they reach for is.

Caches of other packs are such functions: they swap a method or the blocks of the model for the time of a call, and what
they swap in decides what is computed anew. All of that is the pack's own code. This sees to it that the call is the one
of ComfyUI's process, and that nothing is swapped that this process, or a rank with a part of the tokens, does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from ...raylight.blocks import blocks
from ...raylight.errors import UnsupportedError
from ...raylight.mesh import Mesh
from ...raylight.names import name_of, on_options
from ...raylight.rows.row_hooks import RowInstallation
from ...raylight.sequence.alike import Alike
from ...raylight.sequence.hooks import Installation
from ...raylight.sequence.replaced import within
from ..wire.messages import OPTIONS, Wrapped

REMEDY = "Remove the node; where it skips steps, ComfyUI's EasyCache and TeaCache (Ray) do that on the pool"


class Outer:
    """What a model on this worker is to such functions.

    Args:
        installation: how its tokens are divided; None where they are not.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, installation: Installation | RowInstallation | None) -> None:
        self._model = model
        self._control = mesh.control_of(mesh.sequence)
        self._installation = installation

    def run(
        self,
        wrapped: Wrapped,
        method: str,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Have a function call the model, in ComfyUI's place.

        Args:
            method: of the model; the function may have put another in its place when it calls.
            call: called with the method and arguments.

        Raises:
            UnsupportedError: it changes what the call is given or gives, beside transformer_options, swaps something
                that would not take effect, or goes another way on another worker.
        """
        name, inside = name_of(wrapped.function), self._inside(wrapped)
        alike = self._alike(name)
        before = Parts(self._model)
        options: list[dict[str, Any]] = []
        on_options(args, kwargs, options.append)
        given = {key: _Unseen(key, name) if value is None else value[0] for key, value in wrapped.given.items()}
        given[OPTIONS] = options[0]
        kept = [tensor.clone() for tensor in (wrapped.input, wrapped.timestep)]
        outputs: list[Any] = []

        def model_function(x: Any, timestep: Any, *others: Any, **now: Any) -> Any:
            alike.step(Alike.CALL)
            if outputs:
                _refuse(name, "it calls the model more than once at a time")
            same = x is wrapped.input and timestep is wrapped.timestep and not others and now.keys() == given.keys()
            if not same or any(now[key] is not value for key, value in given.items() if key != OPTIONS):
                _refuse(name, "it changes what the model is given")
            _check(name, before.swapped(), method=method, inside=inside)
            changed = on_options(args, kwargs, lambda _: now[OPTIONS])
            outputs.append(self._forward(alike, method, call, *changed))
            return outputs[0]

        assert callable(wrapped.function)
        try:
            found = wrapped.function(
                model_function, {"input": wrapped.input, "timestep": wrapped.timestep, "c": given, **wrapped.more}
            )
            left = list(before.swapped())
        finally:
            before.restore()
        alike.step(Alike.ANSWER)
        if left:
            _refuse(name, f"it leaves something of its own in the place of {left[0]}")
        if not outputs:
            _refuse(name, "it answers in the place of the model")
        if found is not outputs[0]:
            _refuse(name, "it changes what the model gives")
        if not all(map(_equal, kept, (wrapped.input, wrapped.timestep))):
            _refuse(name, "it writes into what the model is given")
        return found

    def _inside(self, wrapped: Wrapped) -> tuple[str, ...]:
        """Names of the modules that see a part of the tokens."""
        if self._installation is None or self._control.size == 1:
            return ()
        if isinstance(self._installation, RowInstallation):
            _refuse_divided(name_of(wrapped.function), "it would see a part of the rows between the model's layers")
        return self._installation.blocks

    def forward(
        self, method: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, names: str
    ) -> Any:
        """Call a model some of whose code is a node's.

        Args:
            names: whose.

        Raises:
            UnsupportedError: it goes another way on another worker.
        """
        if isinstance(self._installation, Installation) and self._installation.between:
            return self._forward(self._alike(names), method, call, args, kwargs)
        current = getattr(self._model, method)
        if self._installation is not None:
            current = partial(self._installation.wrapper, current)
        return call(current, *args, **kwargs)

    def _alike(self, names: str) -> Alike:
        inside = self._installation.blocks if isinstance(self._installation, Installation) else ()
        named = dict(self._model.named_modules())
        steps = dict.fromkeys([*blocks(self._model), *(named[block] for block in inside)])
        return Alike(self._control, list(steps), names)

    def _forward(
        self, alike: Alike, method: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        current, installation = getattr(self._model, method), self._installation

        def asked(*args: Any, **kwargs: Any) -> Any:
            output = current(*args, **kwargs)
            alike.step(Alike.END)
            return output

        if not isinstance(installation, Installation):
            return call(asked, *args, **kwargs)
        with alike.watched(), installation.around(alike):
            return call(partial(installation.wrapper, asked), *args, **kwargs)


class Parts:
    """The modules, classes and methods of a model as they are."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = list(model.named_modules())
        self._classes = [type(module) for _, module in self._modules]
        self._children = [dict(module._modules) for _, module in self._modules]
        self._methods = [_methods(module) for _, module in self._modules]

    def swapped(self) -> Iterator[str]:
        """Dotted names of those that are others by now. What the model had nothing of is no part of it."""
        for (name, module), kind, children, methods in self._each():
            if type(module) is not kind:
                yield _join(name, "__class__")
            for key, child in children.items():
                if module._modules.get(key) is not child or key in vars(module):
                    yield _join(name, key)
            now = _methods(module)
            for key in now.keys() | methods.keys():
                if now.get(key) is not methods.get(key):
                    yield _join(name, key)

    def restore(self) -> None:
        """Put them back."""
        for (_, module), kind, children, methods in self._each():
            if type(module) is not kind:
                module.__class__ = kind
            for key, child in children.items():
                vars(module).pop(key, None)
                module._modules[key] = child
            for key in _methods(module).keys() - methods.keys():
                del vars(module)[key]
            vars(module).update(methods)

    def _each(self) -> Any:
        return zip(self._modules, self._classes, self._children, self._methods, strict=True)


def _methods(module: nn.Module) -> dict[str, Any]:
    """What an instance has in the place of its class's methods."""
    return {key: value for key, value in vars(module).items() if callable(value) and hasattr(type(module), key)}


def _check(name: str, swapped: Iterator[str], *, method: str, inside: tuple[str, ...]) -> None:
    """Refuse swaps that would not take effect, or take effect on a part of the tokens."""
    for place in swapped:
        if place.endswith("__class__") or (place == "forward" and method != place):
            _refuse(name, f"it takes the place of {place}, half of which runs in ComfyUI's process")
        if any(within(place, block) for block in inside):
            _refuse_divided(name, f"it takes the place of {place}, which sees a part of the tokens there")


class _Unseen:
    """Stands for an argument of the model that a function around it hands on."""

    def __init__(self, key: str, name: str) -> None:
        self._key = key
        self._name = name

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        _refuse(self._name, f"it looks at {self._key!r}, which only the model is given")

    def __getitem__(self, item: object) -> NoReturn:
        _refuse(self._name, f"it looks at {self._key!r}, which only the model is given")


def _equal(before: torch.Tensor, now: torch.Tensor) -> bool:
    return torch.equal(before.nan_to_num(), now.nan_to_num())


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _refuse(name: str, why: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} cannot be used with a model on the Raylight pool",
        f"its function around the model reaches into the model, so that it runs on the workers, and {why}",
        REMEDY,
    )


def _refuse_divided(name: str, why: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} cannot be used with a model whose tokens are divided over workers",
        why,
        "Set ulysses_degree and ring_degree to 1. " + REMEDY,
    )
