"""Installing a plan: names are checked, nothing acts outside a forward, nothing is left behind; and kernel names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from comfy_raylight.patches.registry import UNSPLIT, plan_for
from comfy_raylight.raylight.comm import Comm, Meter
from comfy_raylight.raylight.config import ParallelConfig
from comfy_raylight.raylight.cuts import Rope, Split
from comfy_raylight.raylight.errors import ConfigError, PlanError, UnsupportedError
from comfy_raylight.raylight.install import install
from comfy_raylight.raylight.mesh import Mesh
from comfy_raylight.raylight.plan import Blocks, Head, Plan, Region
from comfy_raylight.raylight.sequence import kernels
from comfy_raylight.raylight.sequence.alike import Alike
from torch import nn


class Twin(Comm):
    """Rank 0 of two ranks that hold the same tokens: gathering repeats this rank's part."""

    def __init__(self) -> None:
        meter = Meter()
        self.ranks, self.rank, self.size, self.meter = (0, 1), 0, 2, meter

    def all_gather(self, x: torch.Tensor, *, dim: int, sizes: Any) -> list[torch.Tensor]:
        return [x.narrow(dim, 0, size) for size in sizes]

    def all_reduce(self, x: torch.Tensor, *, op: Any = "sum") -> torch.Tensor:
        return 2 * x if op == "sum" else x


class Site(nn.Module):
    def forward(self, x: torch.Tensor, transformer_options: dict[str, Any] | None = None) -> torch.Tensor:
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Site()
        self.seen: list[int] = []
        self.fail = False

    def forward(
        self, x: torch.Tensor, rope: torch.Tensor | None = None, transformer_options: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        self.seen.append(x.shape[1])
        if rope is not None:
            assert rope.shape[1] == x.shape[1]
        if self.fail:
            raise RuntimeError("block failed")
        return self.attn(x, transformer_options=transformer_options) + 1


class Model(nn.Module):
    """Two blocks and a head over [B, L, C]."""

    def __init__(self, run: int = 2) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList([Block(), Block()])
        self.head: Any = nn.Identity()
        self.run = run

    def _forward(self, x: torch.Tensor, control: Any = None, transformer_options: Any = None) -> torch.Tensor:
        rope = torch.zeros(1, x.shape[1], 1, 2)
        for block in list(self.blocks)[: self.run]:
            x = block(x, rope, transformer_options=transformer_options or {})
        return self.head(x)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._forward(*args, **kwargs)


BLOCKS = Blocks(
    at="blocks.*", streams={"x": Split(1)}, shared={"rope": Rope()}, outputs=(Split(1),), attention=("attn",)
)
PLAN = Plan(Region(BLOCKS, exit=Head("head")))


ALONE = Comm(None, ranks=(0,), rank=0, meter=Meter())


def mesh(**switches: Any) -> Mesh:
    """Two ranks of which only this one exists."""
    comm = Twin()
    parallel = ParallelConfig(world=2, **{"ulysses": 2, "ring": 1, "cfg": 1, **switches})
    return Mesh(
        parallel,
        rank=0,
        comms={"ulysses": comm, "sequence": comm, "ring": ALONE},
        controls={(0, 1): comm},
        meter=comm.meter,
    )


def hooks(model: nn.Module) -> list[dict[str, Any]]:
    names = [name for name in vars(model) if name.endswith("hooks") or "hooks_" in name]
    assert {"_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"} <= set(names)
    return [dict(getattr(module, name)) for module in model.modules() for name in names]


def test_hooks_act_only_in_the_wrapper() -> None:
    model, x = Model(), torch.zeros(1, 6, 2)
    installation = install(model, PLAN, mesh())
    model(x)
    assert [block.seen.pop() for block in model.blocks] == [6, 6]
    assert installation.wrapper(model._forward, x).shape == x.shape
    assert [block.seen.pop() for block in model.blocks] == [3, 3]
    model(x)
    assert [block.seen.pop() for block in model.blocks] == [6, 6]


def test_remove_leaves_the_model_as_it_was() -> None:
    model, x = Model(), torch.randn(1, 6, 2)
    handle = model.blocks[0].register_forward_pre_hook(lambda module, args: None)
    before, want = hooks(model), model(x)
    installation = install(model, PLAN, mesh())
    assert hooks(model) != before
    installation.wrapper(model._forward, x)
    installation.remove()
    installation.remove()
    assert hooks(model) == before
    assert torch.equal(model(x), want) and torch.equal(installation.wrapper(model._forward, x), want)
    handle.remove()


@pytest.mark.parametrize(
    "kwargs, seen",
    [
        ({}, "trunk"),
        ({"control": {}}, "block"),
        ({"transformer_options": {"patches_replace": {"dit": {("double_block", 0): None}}}}, "block"),
        ({"transformer_options": {"patches_replace": {"dit": {}}}}, "trunk"),
        ({"transformer_options": {"patches": {"double_block": [None]}}}, "block"),
        ({"transformer_options": {"patches": {"noise_refiner": [None]}}}, "block"),
        ({"transformer_options": {"patches": {"attn1_output_patch": [None]}}}, "trunk"),
    ],
)
def test_granularity(kwargs: dict[str, Any], seen: str) -> None:
    model, x = Model(), torch.zeros(1, 6, 2)
    between: list[int] = []
    model.blocks[0].register_forward_hook(lambda module, args, out: between.append(out.shape[1]))
    installation = install(model, PLAN, mesh())
    # hooks run in order, so look again after the engine's
    model.blocks[0].register_forward_hook(lambda module, args, out: between.append(out.shape[1]))
    installation.wrapper(model._forward, x, **kwargs)
    assert between == [3, 3 if seen == "trunk" else 6]
    # positional, as ComfyUI's executor passes them
    between.clear()
    installation.wrapper(model._forward, x, kwargs.get("control"), kwargs.get("transformer_options", {}))
    assert between == [3, 3 if seen == "trunk" else 6]


@pytest.mark.parametrize("granularity", ("trunk", "block"))
def test_blocks_with_replaced_code_are_compared(granularity: Any) -> None:
    """All of them at first, then one after another."""
    model, x = Model(), torch.randn(1, 6, 2)
    installation = install(model, PLAN, mesh(), granularity=granularity)
    for block in model.blocks:
        block.attn.forward = lambda x, transformer_options=None: 2 * x
    names = [f"blocks.{index}.attn.forward" for index in range(2)]
    installation.changed(dict.fromkeys(names, model.blocks[0].attn.forward))
    for want in ([[6, 3], [6, 3]], [[3], [6, 3]], [[6, 3], [3]]):
        installation.wrapper(model._forward, x)
        assert [block.seen for block in model.blocks] == want
        for block in model.blocks:
            block.seen.clear()
    installation.changed({names[1]: model.blocks[1].attn.forward})
    installation.wrapper(model._forward, x)
    assert [block.seen for block in model.blocks] == [[3], [6, 3]]
    installation.changed({})
    installation.wrapper(model._forward, x)
    assert [block.seen[-1:] for block in model.blocks] == [[3], [3]] and len(model.blocks[1].seen) == 3


def add_the_sum(x: torch.Tensor, transformer_options: Any = None) -> torch.Tensor:
    return x + x.sum(1, keepdim=True)


def want_six_tokens(x: torch.Tensor, transformer_options: Any = None) -> torch.Tensor:
    return x.view(1, 6, 2) + 1


@pytest.mark.parametrize(
    "code, message",
    [
        (add_the_sum, r"add_the_sum.*cannot be used.*differs by.*ring_degree to 1"),
        (want_six_tokens, r"want_six_tokens.*cannot be used.*wants all tokens: RuntimeError.*ring_degree to 1"),
    ],
)
def test_replaced_code_that_looks_across_tokens_is_refused(code: Any, message: str) -> None:
    model, x = Model(), torch.randn(1, 6, 2)
    installation = install(model, PLAN, mesh())
    model.blocks[1].attn.forward = code
    installation.changed({"blocks.1.attn.forward": code})
    with pytest.raises(UnsupportedError, match=message):
        installation.wrapper(model._forward, x)


def test_code_between_blocks_sees_all_tokens() -> None:
    model, x = Model(), torch.randn(1, 3, 2).repeat(1, 2, 1)  # both ranks hold the same
    model.head.forward = lambda x: x + x.sum(1, keepdim=True)
    wanted = model(x)
    installation = install(model, PLAN, mesh())
    installation.changed({"head.forward": model.head.forward})
    assert torch.equal(installation.wrapper(model._forward, x), wanted)


class Adding(nn.Module):
    """A block that writes into its input, and returns that or something new."""

    def __init__(self, *, new: bool) -> None:
        super().__init__()
        self.attn = Site()
        self.new = new

    def forward(self, x: torch.Tensor, rope: Any = None, transformer_options: Any = None) -> torch.Tensor:
        x += self.attn(x, transformer_options=transformer_options)
        return x * 3 if self.new else x


@pytest.mark.parametrize("new", (False, True))
def test_code_around_blocks_sees_what_they_write(new: bool) -> None:
    model, tokens = Model(), torch.ones(1, 4, 3)
    model.blocks = nn.ModuleList([Adding(new=new)])
    installation: Any = install(model, PLAN, mesh())

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        given = tokens.clone()
        return given, model.blocks[0](given, torch.zeros(1, 4, 1, 2), transformer_options={})

    alike = Alike(Twin(), list(model.blocks), "A node")
    plain = forward()
    with alike.watched(), installation.around(alike):
        found = installation.wrapper(forward)
    for given, out in (plain, found):
        assert torch.equal(given, 2 * tokens) and torch.equal(out, (6 if new else 2) * tokens)
        assert (given is out) is not new


def test_ranks_that_go_apart_leave_together() -> None:
    class Apart(Twin):
        def all_reduce(self, x: torch.Tensor, *, op: Any = "sum") -> torch.Tensor:
            return torch.maximum(x, torch.tensor([5, -5])) if op == "max" else 2 * x

    alike = Alike(Apart(), [nn.Identity() for _ in range(6)], "A node")
    alike.step(5)
    with pytest.raises(UnsupportedError, match="A node cannot be used.*on one worker than on another"):
        alike.step(4)


def test_a_module_with_hooks_cannot_be_replaced() -> None:
    model = Model()
    installation = install(model, PLAN, mesh())
    for name in ("blocks.1", "blocks.0.attn", "blocks"):
        with pytest.raises(UnsupportedError, match=rf"Block.*takes the place of {name}\b"):
            installation.changed({name: Block()})
    installation.changed({"embedder": nn.Identity(), "scale": 3})


@pytest.mark.parametrize("granularity", ("trunk", "block"))
def test_a_failed_forward_leaves_no_state(granularity: Any) -> None:
    model, x = Model(), torch.zeros(1, 6, 2)
    installation = install(model, PLAN, mesh(), granularity=granularity)
    model.blocks[1].fail = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="block failed"):
            installation.wrapper(model._forward, x)
    model.blocks[1].fail = False
    assert installation.wrapper(model._forward, x).shape == x.shape


def test_a_region_that_is_not_left_raises() -> None:
    model = Model(run=1)
    model.head = nn.Module()
    model.head.forward = lambda x: x
    installation = install(model, Plan(Region(BLOCKS)), mesh())
    with pytest.raises(PlanError, match="not left"):
        installation.wrapper(model._forward, torch.zeros(1, 6, 2))
    model.run = 2
    assert installation.wrapper(model._forward, torch.zeros(1, 6, 2)).shape[1] == 6


def test_a_first_block_that_did_not_run_raises() -> None:
    model = Model()
    installation = install(model, PLAN, mesh())
    with pytest.raises(PlanError, match="not entered"):
        installation.wrapper(model.blocks[1], torch.zeros(1, 6, 2))


@pytest.mark.parametrize(
    "blocks, word",
    [
        (replace(BLOCKS, at="layers.*"), "layers"),
        (replace(BLOCKS, attention=("self_attn",)), "self_attn"),
        (replace(BLOCKS, order=("x", "txt")), "segments"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(blocks: Blocks, word: str) -> None:
    model = Model()
    before = hooks(model)
    with pytest.raises(PlanError, match=word):
        install(model, Plan(Region(blocks)), mesh())
    assert hooks(model) == before


class Strict(nn.Module):
    """A block that takes no other arguments than these."""

    def forward(self, x: torch.Tensor, transformer_options: Any = None) -> torch.Tensor:
        return x


def test_names_are_resolved_at_install() -> None:
    model = Model()
    model.blocks = nn.ModuleList([Strict()])
    blocks = replace(BLOCKS, attention=("",))
    with pytest.raises(PlanError, match="rope"):
        install(model, Plan(Region(blocks)), mesh())
    install(model, Plan(Region(replace(blocks, optional=("rope",)))), mesh()).remove()
    with pytest.raises(PlanError, match="img"):
        install(model, Plan(Region(replace(blocks, streams={"img": Split(1)}, optional=("rope",)))), mesh())


def test_names_reach_into_keyword_arguments() -> None:
    model, x = Model(), torch.zeros(1, 6, 2)
    cut: list[int] = []

    def entry(value: torch.Tensor, layout: Any) -> torch.Tensor:
        cut.append(value.shape[1])
        return layout.split(value, dim=1, over=("x",))

    shared: dict[str, Any] = {"rope": Rope(), "extra": entry}
    installation = install(model, Plan(Region(replace(BLOCKS, shared=shared))), mesh())

    def forward(x: torch.Tensor) -> torch.Tensor:
        extra = torch.zeros(1, 6)
        for block in model.blocks:
            x = block(x, extra=extra)
        return x

    assert installation.wrapper(forward, x).shape == x.shape
    assert cut == [6], "the same object is cut once for all blocks"


def test_one_process_installs_nothing() -> None:
    model, x = Model(), torch.zeros(1, 6, 2)
    before = hooks(model)
    installation = install(model, PLAN, Mesh.single())
    assert hooks(model) == before
    assert torch.equal(installation.wrapper(model._forward, x), model(x))
    installation.remove()


@pytest.mark.parametrize("family", ("StageC", "CausalWanModel", "NoSuchModel"))
def test_an_unknown_family_is_named(family: str) -> None:
    subclass = type(family, (type("WanModel", (torch.nn.Module,), {}),), {})
    with pytest.raises(UnsupportedError) as caught:
        plan_for(subclass())
    assert family in str(caught.value) and "cfg_degree and data parallel" in str(caught.value)
    assert UNSPLIT.get(family, "no plan") in str(caught.value)


def test_kernel_names_cover_yunchang() -> None:
    attention = pytest.importorskip("yunchang.kernels")
    assert tuple(member.name for member in attention.AttnType) == kernels.MEMBERS
    assert kernels.NAMES[0] == "TORCH" and len(set(kernels.NAMES)) == len(kernels.NAMES)
    assert set(kernels.ALIASES.values()) <= set(kernels.MEMBERS)


def test_torch_is_comfyuis_own() -> None:
    assert kernels.resolve("TORCH") is None


@pytest.mark.parametrize("name", ("NOPE", "SPARSE_SAGE"))
def test_a_kernel_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){name}.*XFuser_attention"):
        kernels.resolve(name)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="these kernels need an accelerator")
@pytest.mark.parametrize("name", [n for n in kernels.NAMES if n not in ("TORCH", "TORCH_MATH")])
def test_kernels_say_what_to_do_without_an_accelerator(name: str) -> None:
    with pytest.raises(ConfigError, match="Set XFuser_attention to TORCH"):
        kernels.resolve(name)


@pytest.mark.parametrize("skip_output_reshape", (False, True))
@pytest.mark.parametrize("skip_reshape", (False, True))
def test_a_kernel_computes_what_comfyui_would(skip_reshape: bool, skip_output_reshape: bool) -> None:
    pytest.importorskip("yunchang")
    kernel: Any = kernels.resolve("TORCH_MATH")
    q, k, v = torch.randn(3, 2, 5, 7, 4).unbind(0)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    if not skip_output_reshape:
        want = want.transpose(1, 2).flatten(2)
    given = [t if skip_reshape else t.transpose(1, 2).flatten(2) for t in (q, k, v)]
    forms = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}

    def never(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("not called without a mask")

    assert torch.allclose(kernel(never, *given, 5, **forms), want, atol=1e-6)
    if not skip_reshape:
        # HyperTile regroups the queries only
        tiles = [t.unflatten(1, (-1, 1)).flatten(0, 1) for t in given]
        assert torch.equal(kernel(never, tiles[0], *given[1:], 5, **forms), kernel(never, *tiles, 5, **forms))
    mask = torch.zeros(1, 1, 7, 7)
    passed: dict[str, Any] = {}

    def own(*args: Any, **kwargs: Any) -> torch.Tensor:
        passed.update(kwargs)
        return want

    assert kernel(own, *given, 5, mask, extra=1, **forms) is want
    assert passed["mask"] is mask and passed["extra"] == 1 and passed["skip_reshape"] is skip_reshape
