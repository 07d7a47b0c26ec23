"""Values between processes: what crosses, what is only named, and what stays shared."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_raylight.raylight.errors import UnsupportedError
from comfy_raylight.workers.wire.arena import Arena
from comfy_raylight.workers.wire.decoder import Decoder
from comfy_raylight.workers.wire.encoder import HELD_LIMIT, Encoder, Shelf
from comfy_raylight.workers.wire.path_modules import resolve
from comfy_raylight.workers.wire.pickling import copied


def pair(*, shared: bool) -> tuple[Encoder, Decoder]:
    return Encoder(lambda _: None, shared=shared), Decoder(lambda name: name, torch.device("cpu"))


@pytest.fixture(params=[True, False], ids=["shared memory", "bytes"])
def ends(request: pytest.FixtureRequest) -> tuple[Encoder, Decoder]:
    if request.param and not Arena.supported():
        pytest.skip("this system has no anonymous shared memory")
    return pair(shared=request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_every_dtype_and_shape(ends: tuple[Encoder, Decoder], dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    encoder, decoder = ends
    value = torch.rand(shape).mul(4).to(dtype)
    back = decoder.decode(encoder.encode({"x": [value, 1, "a"]}))["x"]
    assert back[1:] == [1, "a"]
    assert back[0].dtype == dtype and back[0].shape == value.shape
    assert torch.equal(back[0].double(), value.double())


def test_non_contiguous(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    value = torch.randn(6, 8)[::2, 1::3].t()
    assert torch.equal(decoder.decode(encoder.encode(value)), value)


def test_equal_content_crosses_once(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    context = torch.randn(256, 256)
    decoder.decode(encoder.encode(context))
    first = encoder.bytes_sent
    again = decoder.decode(encoder.encode(context.clone()))
    assert encoder.bytes_sent - first < 1024
    assert torch.equal(again, context)
    changed = context.clone()
    changed[3, 4] += 1
    assert torch.equal(decoder.decode(encoder.encode(changed)), changed)


def test_writing_into_a_sent_tensor_is_seen(ends: tuple[Encoder, Decoder]) -> None:
    """The comparison is with a copy: the caller may write into its tensor between calls."""
    encoder, decoder = ends
    context = torch.randn(256, 256)
    decoder.decode(encoder.encode(context))
    context.add_(1)
    assert torch.equal(decoder.decode(encoder.encode(context)), context)


def test_writing_into_what_came_is_not_seen(ends: tuple[Encoder, Decoder]) -> None:
    """A model may write into its conditioning: the next call, of this model or another, has it as it was sent."""
    encoder, decoder = ends
    context = torch.randn(256, 256)
    for _ in range(3):
        came = decoder.decode(encoder.encode(context.clone()))
        assert torch.equal(came, context)
        came.zero_()


def test_fresh_tensors_are_not_kept(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    x = torch.randn(256, 256)
    decoder.decode(encoder.encode(x, fresh=[x]))
    assert not encoder._held and not decoder._held


def test_both_ends_forget_alike(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    for _ in range(2):  # more new tensors in one call than may be held
        values = [torch.randn(256, 65) for _ in range(HELD_LIMIT + 5)]
        for value, back in zip(values, decoder.decode(encoder.encode(values)), strict=True):
            assert torch.equal(back, value)
    decoder.decode(encoder.encode(torch.randn(256, 65)))
    decoder.decode(encoder.encode(0))
    assert set(encoder._held) == set(decoder._held)
    assert len(decoder._held) <= HELD_LIMIT


def test_kept_tensors_live_as_long_as_the_callers(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    weight = torch.randn(300, 300)
    decoder.decode(encoder.encode(weight, keep=True))
    sent = encoder.bytes_sent
    assert torch.equal(decoder.decode(encoder.encode([weight], keep=True))[0], weight)
    assert encoder.bytes_sent - sent < 1024
    del weight
    gc.collect()
    decoder.decode(encoder.encode(0))
    assert not decoder._held


@pytest.mark.skipif(not Arena.supported(), reason="this system has no anonymous shared memory")
def test_groups_share_what_is_kept() -> None:
    shelf = Shelf(2)
    first, second = (Encoder(lambda _: None, shared=True, shelf=shelf) for _ in range(2))
    weights = [torch.randn(300, 300), torch.randn(7)]
    second.encode([torch.randn(5)], keep=True)  # what only one of them sends changes nothing for the other
    parcels = [encoder.encode(weights, keep=True) for encoder in (first, second)]
    assert parcels[0].arena == parcels[1].arena
    found = [pair(shared=True)[1].decode(parcel) for parcel in parcels]
    for weight, one, other in zip(weights, *found, strict=True):
        assert torch.equal(one, weight) and torch.equal(other, weight)
    assert parcels[0].arena != first.encode([*weights, torch.randn(3)], keep=True).arena


def test_failed_encoding_leaves_nothing_behind(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    context = torch.randn(256, 256)
    with pytest.raises(UnsupportedError, match="cannot be sent"):
        encoder.encode([context, (value for value in [1])])
    assert torch.equal(decoder.decode(encoder.encode(context)), context)


def test_weights_without_data_are_refused(ends: tuple[Encoder, Decoder]) -> None:
    with pytest.raises(UnsupportedError, match="only the workers hold"):
        ends[0].encode(torch.empty(3, device="meta"))


def test_functions_keep_sharing_their_closure(ends: tuple[Encoder, Decoder]) -> None:
    encoder, decoder = ends
    count = 0

    def up() -> None:
        nonlocal count
        count += 1

    def read() -> int:
        return count

    def recurse(n: int) -> int:
        return 0 if n == 0 else 1 + recurse(n - 1)

    far_up, far_read, far_recurse = decoder.decode(encoder.encode([up, read, recurse]))
    far_up()
    far_up()
    assert (far_read(), read()) == (2, 0)
    assert far_recurse(3) == 3


def test_live_objects_are_named(ends: tuple[Encoder, Decoder]) -> None:
    class Live:
        pass

    live = Live()
    encoder = Encoder(lambda value: ("live object",) if value is live else None, shared=False)
    assert ends[1].decode(encoder.encode({"a": [live]})) == {"a": [("live object",)]}


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_answers(ends: tuple[Encoder, Decoder], size: int) -> None:
    """A small answer uses the room the request left, a large one travels along with the message."""
    encoder, decoder = ends
    request = encoder.encode(0)
    output: Any = [torch.randn(size), (torch.arange(3), "text")]
    reply = decoder.answer(output, request)
    back = encoder.decode_reply(reply)
    assert torch.equal(back[0], output[0]) and torch.equal(back[1][0], output[1][0]) and back[1][1] == "text"
    if request.arena is not None:
        assert (reply.inline is None) == (size == 10)
        encoder.expect_reply(len(reply.inline or b""))
        assert decoder.answer(output, encoder.encode(0)).inline is None


def test_functions_of_modules_named_by_path(ends: tuple[Encoder, Decoder], tmp_path: Path) -> None:
    """ComfyUI names a node file by its path, in which there may be dots."""
    file = tmp_path / "comfy-0.3" / "nodes_x.py"
    file.parent.mkdir()
    file.write_text("class Node:\n    value = 7\n\ndef twice(x):\n    return 2 * x\n")
    name = str(file.with_suffix(""))
    resolve(name, "twice")
    module = sys.modules[name]

    encoder, decoder = ends
    parcel = encoder.encode([module.twice, module.Node, module.Node()])
    try:
        assert [decoder.decode(parcel)[0](3), decoder.decode(parcel)[1].value] == [6, 7]
        del sys.modules[name]  # as in a worker, which has not loaded it
        function, cls, instance = decoder.decode(parcel)
        assert function(3) == 6 and isinstance(instance, cls) and cls is not module.Node
    finally:
        sys.modules.pop(name, None)


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A node pack in a folder: its name among modules, and the folder. Workers have not loaded it."""
    folder = tmp_path / "comfy-0.3" / "some-pack"
    (folder / "nodes").mkdir(parents=True)
    name = str(folder).replace(".", "_x_")
    try:
        yield name, folder
    finally:
        for module in [module for module in sys.modules if module.startswith(name)]:
            del sys.modules[module]


def test_a_module_of_a_pack_comes_without_the_pack(ends: tuple[Encoder, Decoder], pack: tuple[str, Path]) -> None:
    """A pack's own code imports all of its nodes and talks to ComfyUI's server: a worker does without if it can."""
    name, folder = pack
    (folder / "__init__.py").write_text("raise RuntimeError('this pack runs in ComfyUI only')\n")
    (folder / "factor.py").write_text("FACTOR = 3\n")
    code = "from ..factor import FACTOR\nfrom .. import factor\n\ndef times(x):\n    return FACTOR * x\n"
    (folder / "nodes" / "math.py").write_text(code)
    times = resolve(f"{name}.nodes.math", "times")
    encoder, decoder = ends
    parcel = encoder.encode([times, sys.modules[f"{name}.nodes.math"], sys.modules[f"{name}.factor"]])
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]
    function, module, factor = decoder.decode(parcel)
    assert function is not times and function(4) == 12
    assert module.times is function and factor is module.factor


def test_a_module_that_needs_its_pack_has_it(ends: tuple[Encoder, Decoder], pack: tuple[str, Path]) -> None:
    name, folder = pack
    (folder / "__init__.py").write_text("FACTOR = 5\nfrom .nodes import math\n")
    (folder / "nodes" / "math.py").write_text("from .. import FACTOR\n\ndef times(x):\n    return FACTOR * x\n")
    function = resolve(f"{name}.nodes.math", "times")
    assert function(4) == 20 and sys.modules[name].FACTOR == 5
    encoder, decoder = ends
    assert decoder.decode(encoder.encode(function)) is function


def test_a_pack_that_cannot_be_imported_is_named(pack: tuple[str, Path]) -> None:
    name, folder = pack
    (folder / "__init__.py").write_text("import a_package_that_is_not_there\n")
    (folder / "nodes" / "math.py").write_text("import another_package_that_is_not_there\n")
    for module in (f"{name}.nodes.math", name):
        with pytest.raises(UnsupportedError, match=r"some-pack cannot be used.*a_package_that_is_not_there"):
            resolve(module, "times")
    with pytest.raises(UnsupportedError, match="file is not on this machine"):
        resolve(f"{name}-2.nodes.math", "times")


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


class Counter:
    def __init__(self) -> None:
        self.count = 0


def test_a_copy_has_a_state_of_its_own() -> None:
    """Functions, what they close over and what they share with each other; tensors are the same ones."""
    total, counter, weight = 0, Counter(), torch.ones(2)

    def add() -> torch.Tensor:
        nonlocal total
        total += 1
        counter.count += 1
        return weight

    def seen() -> tuple[int, int]:
        return total, counter.count

    value: dict[str, Any] = {"add": add, "seen": [seen], "counter": counter, "weight": weight}
    other = copied(value, is_tensor)
    for _ in range(2):
        assert other["add"]() is weight
    assert other["seen"][0]() == (2, 2) and other["counter"].count == 2 and other["weight"] is weight
    assert seen() == (0, 0) and counter.count == 0
    assert copied(value, is_tensor)["seen"][0]() == (0, 0)


def test_what_cannot_be_copied_is_said() -> None:
    with pytest.raises(UnsupportedError, match="cannot be copied.*generator"):
        copied({"numbers": (number for number in range(3))}, is_tensor)
