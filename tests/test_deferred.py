"""Tensors that are computed elsewhere: what ComfyUI's code does to them gives the same bits there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfy_raylight.raylight.cfg import mapped
from comfy_raylight.raylight.config import ModelSpec
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.workers.wire.decoder import Decoder
from comfy_raylight.workers.wire.deferred import Computed, Evaluation, Result, deferred_in, filled, outline
from comfy_raylight.workers.wire.encoder import Encoder

SPEC = ModelSpec(path="control", size=1, mtime_ns=1, inode=1)
CPU = torch.device("cpu")


def residuals(x: torch.Tensor) -> dict[str, Any]:
    """As a ControlNet returns them: some twice, some none."""
    first, second = x * 2, (x + 1).to(torch.bfloat16)
    return {"input": (first, first, None, second), "middle": [x.mean(dim=1)]}


def there(done: Callable[[Any], Any]) -> tuple[Any, int]:
    """What `done` makes of the residuals, computed on the other side, and how often they were evaluated."""
    x = torch.linspace(-1, 1, 24).view(2, 3, 4)
    evaluation = Evaluation(SPEC, {"x": x})
    put_off = done(filled(outline(residuals(x)), evaluation, None, CPU))
    encoder, decoder = Encoder(lambda _: None, shared=False), Decoder(lambda name: name, CPU)
    calls = []

    def evaluate(asked: Evaluation) -> Any:
        calls.append(asked)
        return residuals(asked.arguments["x"])

    computed = Computed(evaluate, CPU)

    found = decoder.decode(encoder.encode(put_off))
    return mapped(found, lambda item: computed.tensor(item) if isinstance(item, Result) else item), len(calls)


def here(done: Callable[[Any], Any]) -> Any:
    return done(residuals(torch.linspace(-1, 1, 24).view(2, 3, 4)))


def scaled(found: Any) -> Any:
    """As ControlBase.control_merge does it: in place, and what is there twice only once."""
    applied = set()
    for x in found["input"]:
        if x is not None and x not in applied:
            applied.add(x)
            x *= 0.37  # noqa: PLW2901, as ComfyUI does it
    return found


def written_after_use(found: Any) -> Any:
    x = found["input"][0]
    before = x + 1
    x *= 3
    return [before, x, x + 1]


CASES: dict[str, Callable[[Any], Any]] = {
    "as they are": lambda found: found,
    "scaled": scaled,
    "written after use": written_after_use,
    "added": lambda found: [torch.linspace(0, 1, 24).view(2, 3, 4) + x for x in found["input"] if x is not None],
    "rows": lambda found: [x[1:2] for x in found["input"][:2]],
    "converted": lambda found: found["input"][3].to(torch.float32),
    "moved": lambda found: found["input"][0].to(CPU, torch.float16),
    "joined": lambda found: torch.cat([found["input"][0], found["input"][1]], dim=1),
    "parts": lambda found: list(found["input"][0].chunk(2, dim=2)),
    "pooled": lambda found: torch.mean(found["input"][0], dim=(1, 2), keepdim=True).repeat(1, 3, 4),
}


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "plain"])
@pytest.mark.parametrize("done", CASES.values(), ids=CASES)
def test_operations_give_the_same_bits(done: Callable[[Any], Any], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        found, calls = there(done)
        assert same(found, here(done))
        assert calls == 1


def test_shape_and_dtype_are_known() -> None:
    with torch.inference_mode():
        x = torch.zeros(2, 3, 4)
        found = filled(outline(residuals(x)), Evaluation(SPEC, {"x": x}), "asked", CPU)
        half = found["input"][3].float()[:, 1:]
        assert half.shape == (2, 2, 4) and half.dtype == torch.float32 and half.device == CPU
        assert found["input"][0] is found["input"][1]
        assert [asked for tensor in deferred_in(found) for _, asked in tensor.sources] == ["asked"] * 4


@pytest.mark.parametrize(
    "done",
    [
        lambda x: float(x.sum()),
        lambda x: torch.equal(x, x),
        lambda x: x[x > 0],
        lambda x: x[:1].mul_(2),
        lambda x: torch.zeros(2, 3, 4).add_(x),
    ],
    ids=["a number", "compared", "masked", "a part is written to", "added into another"],
)
def test_what_needs_values_is_refused(done: Callable[[torch.Tensor], Any]) -> None:
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="ControlNet on the workers"):
        there(lambda found: done(found["input"][0]))
