"""Local kernels: the log-sum-exp that a ring merges by, and what is refused before anything is loaded."""

from __future__ import annotations

import sys
from enum import Enum
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfy_raylight.raylight.errors import ConfigError
from comfy_raylight.raylight.sequence import kernels, torch_kernels

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOLERANCES = {
    torch.float64: (1e-13, 1e-12),
    torch.float32: (2e-6, 1e-5),
    torch.float16: (1e-3, 1e-4),
    torch.bfloat16: (8e-3, 1e-4),
}
"""Of the output, relative to its largest value, and of the log-sum-exp."""


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q.double() @ k.double().mT * scale + (0 if mask is None else mask.double())
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


@pytest.mark.parametrize("masked", ("", "keys", "rows"))
@pytest.mark.parametrize("widths", ((64, 64), (40, 40), (20, 20), (64, 32), (256, 256)))
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("member", ("TORCH", "TORCH_MATH", "TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN"))
@pytest.mark.parametrize("device", DEVICES)
def test_output_and_log_sum_exp(
    device: str, member: str, dtype: torch.dtype, widths: tuple[int, int], masked: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, keys = 37, 53
    shapes = ((2, rows, 3, widths[0]), (2, keys, 3, widths[0]), (2, keys, 3, widths[1]))
    # as they come from an exchange: heads are not the second dim in memory
    q, k, v = (torch.randn(s, generator=generator).to(device, dtype).transpose(1, 2) for s in shapes)
    mask = None
    if masked:
        mask = torch.randn(2, 1, rows if masked == "rows" else 1, keys, generator=generator).to(device, dtype)
        mask[..., :7] = max(-1e30, torch.finfo(dtype).min)
    scale = 1.5 * widths[0] ** -0.5
    out, lse = torch_kernels.with_lse(q, k, v, mask=mask, scale=scale, member=member)
    want, logs = reference(q, k, v, mask, scale)
    assert out.dtype == dtype and out.shape == want.shape and lse.shape == logs.shape
    assert lse.dtype in (torch.float32, torch.float64)
    of_output, of_lse = TOLERANCES[dtype]
    assert (out.double() - want).abs().max() <= of_output * want.abs().max()
    assert (lse.double() - logs).abs().max() <= of_lse


def test_the_explicit_form_takes_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind(0)
    mask = torch.randn(1, 1, 9, 9)
    once = torch_kernels.explicit(q, k, v, mask=mask, scale=0.5)
    monkeypatch.setattr(torch_kernels, "CHUNK", 40)
    again = torch_kernels.explicit(q, k, v, mask=mask, scale=0.5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(once, again, strict=True))


def test_torch_is_comfyuis_own_but_in_a_ring() -> None:
    assert kernels.resolve("TORCH") is None
    kernel = kernels.resolve("TORCH", ring=True)
    assert kernel is not None and kernel.name == "TORCH"
    q, k, v = torch.randn(3, 1, 2, 9, 4).unbind(0)
    out, _ = kernel.with_lse(q, k, v, scale=0.5)
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, scale=0.5), atol=1e-6)


def test_math_runs_everywhere() -> None:
    for ring in (False, True):
        kernel = kernels.resolve("TORCH_MATH", ring=ring)
        assert kernel is not None and kernel.name == "TORCH_MATH"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="these kernels need CUDA")
@pytest.mark.parametrize("name", ("TORCH_FLASH", "TORCH_EFFICIENT", "TORCH_CUDNN", "TORCH_MATH"))
def test_torchs_own_on_cuda(name: str) -> None:
    before = torch.cuda.get_rng_state()
    for ring in (False, True):
        kernel = kernels.resolve(name, ring=ring)
        assert kernel is not None
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    kernels.resolve("TORCH_MATH", ring=True)
    assert torch.equal(before, torch.get_rng_state())


class Installed:
    """A yunchang and an xfuser that claim to have everything, around one attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lse: Any = lambda lse: lse
        self.fails = ""
        self.calls: list[dict[str, Any]] = []
        package, installed, kernel_module = (ModuleType(f"yunchang{end}") for end in ("", ".globals", ".kernels"))
        flags = {flag for flag, _ in kernels._YUNCHANG.values()}
        vars(installed).update(dict.fromkeys(flags, True))
        vars(package).update(globals=installed, kernels=kernel_module)
        attn_type = Enum("AttnType", {name: name for name in kernels.MEMBERS if name != "FLASHINFER"})  # type: ignore[misc]
        vars(kernel_module).update(AttnType=attn_type, select_flash_attn_impl=lambda member, stage: self.yunchang)
        xfuser = [ModuleType(name) for name in ("xfuser", "xfuser.core", "xfuser.core.distributed")]
        backend = ModuleType("xfuser.core.distributed.attention_backend")
        members = Enum("AttentionBackendType", {name: name for name in kernels._XFUSER})  # type: ignore[misc]
        vars(backend).update(
            AttentionBackendType=members,
            ATTENTION_FUNCTION_REGISTRY=dict.fromkeys(members, self.xfuser),
            env_info=dict.fromkeys((flag for flag, _ in kernels._XFUSER.values()), True),
        )
        self.globals, self.env = vars(installed), vars(backend)["env_info"]
        for module in (package, installed, kernel_module, *xfuser, backend):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        on_cpu = partial(kernels._try, device=torch.device("cpu"))
        monkeypatch.setattr(kernels, "_try", lambda name, forward, *, device, ring: on_cpu(name, forward, ring=ring))

    def yunchang(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> tuple[Any, ...]:
        self.calls.append(options)
        scale = next(options[name] for name in ("softmax_scale", "sm_scale", "scale") if name in options)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, lse = self._compute(q, k, v, scale)
        if "head_num" in options:
            assert options["head_num"] == q.shape[1]
            top = torch.ones_like(lse)[..., None].expand(*lse.shape, 8)
            return out.transpose(1, 2), top, (lse - 1).exp()[..., None].expand(*lse.shape, 8), scale
        return out.transpose(1, 2), self.lse(lse)

    def xfuser(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float, causal: bool) -> Any:
        assert dropout == 0 and causal is False
        out, lse = self._compute(q, k, v, q.shape[-1] ** -0.5)
        return out, self.lse(lse)

    def _compute(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Any:
        if self.fails:
            raise RuntimeError(self.fails)
        return torch_kernels.explicit(q, k, v, mask=None, scale=scale)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    return Installed(monkeypatch)


NAMED = [n for n in (*kernels._YUNCHANG, *kernels._XFUSER, "FLASH_ATTN", "SAGE_FP8_CUDA") if n != "FLASHINFER"]


@pytest.mark.parametrize("skip_reshape", (False, True))
@pytest.mark.parametrize("name", NAMED)
def test_a_named_kernel_computes_attention(installed: Installed, name: str, skip_reshape: bool) -> None:
    kernel: Any = kernels.resolve(name)
    q, k, v = torch.randn(3, 2, 5, 7, 8, dtype=torch.bfloat16).unbind(0)
    given = [t if skip_reshape else t.transpose(1, 2).flatten(2) for t in (q, k, v)]

    def never(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise AssertionError("not called")

    for scale in (None, 0.7):
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale)
        options = {} if scale is None else {"scale": scale}
        out = kernel(never, *given, 5, skip_reshape=skip_reshape, **options)
        assert (out - want.transpose(1, 2).flatten(2)).abs().max() < 0.03
        out = kernel(never, *given, 5, skip_reshape=skip_reshape, skip_output_reshape=True, **options)
        assert (out - want).abs().max() < 0.03


@pytest.mark.parametrize("name", [n for n in NAMED if n not in kernels._XFUSER or n in kernels._XFUSER_LSE])
def test_a_named_kernel_gives_its_log_sum_exp(installed: Installed, name: str) -> None:
    # some pad the rows to their tile
    installed.lse = lambda lse: F.pad(lse, (0, 128), value=9.0)
    kernel = kernels.resolve(name, ring=True)
    assert kernel is not None
    calls = len(installed.calls)
    q, k, v = torch.randn(3, 2, 5, 7, 8, dtype=torch.bfloat16).unbind(0)
    out, lse = kernel.with_lse(q, k, v, scale=0.7)
    want, logs = reference(q, k, v, None, 0.7)
    assert (out - want).abs().max() < 0.03 and (lse - logs).abs().max() < 0.02 and lse.dtype == torch.float32
    assert len(installed.calls) == calls + (name not in kernels._XFUSER)
    # PyTorch's own computes what the kernel does not take
    mask = torch.randn(2, 1, 7, 7, dtype=torch.bfloat16)
    assert (kernel.with_lse(q, k, v, mask=mask, scale=0.7)[0] - reference(q, k, v, mask, 0.7)[0]).abs().max() < 0.05
    full = [t.float() for t in (q, k, v)]
    assert (kernel.with_lse(*full, scale=0.7)[0] - reference(q, k, v, None, 0.7)[0]).abs().max() < 1e-5
    assert len(installed.calls) == calls + (name not in kernels._XFUSER)


@pytest.mark.parametrize(
    "what, change",
    (
        ("no log-sum-exp", lambda lse: None),
        ("log-sum-exp is wrong", torch.zeros_like),
        ("log-sum-exp is wrong", lambda lse: lse / 0.6931),
        ("no log-sum-exp", lambda lse: lse.transpose(1, 2)),
        ("log-sum-exp is wrong", lambda lse: lse.flip(2)),
        ("log-sum-exp is wrong", lambda lse: lse * torch.nan),
    ),
)
def test_a_ring_needs_a_right_log_sum_exp(installed: Installed, what: str, change: Any) -> None:
    installed.lse = change
    assert kernels.resolve("FA") is not None
    with pytest.raises(ConfigError, match=f"(?s){what}.*Set XFuser_attention to TORCH, or ring_degree to 1"):
        kernels.resolve("FA", ring=True)


def test_kernels_that_a_ring_cannot_use(installed: Installed) -> None:
    for name in set(kernels._XFUSER) - set(kernels._XFUSER_LSE):
        assert kernels.resolve(name) is not None
        with pytest.raises(ConfigError, match="no log-sum-exp"):
            kernels.resolve(name, ring=True)


@pytest.mark.parametrize("name", ("FA", "FLASH_4", "SAGE_AUTO_DETECT", "AITER_FP8"))
def test_what_is_not_installed_is_named(installed: Installed, name: str) -> None:
    installed.globals.clear()
    installed.env.clear()
    member = kernels.ALIASES.get(name, name)
    package = {**kernels._YUNCHANG, **kernels._XFUSER}[member][1]
    with pytest.raises(ConfigError) as caught:
        kernels.resolve(name)
    assert f"{name} is not installed" in str(caught.value) and f"or install {package}" in str(caught.value)


def test_a_kernel_that_fails_is_refused_with_its_reason(installed: Installed) -> None:
    installed.fails = "no kernel image for this device"
    with pytest.raises(ConfigError, match="(?s)FA cannot run here.*no kernel image.*Set XFuser_attention to TORCH"):
        kernels.resolve("FA")


def test_a_kernel_that_yunchang_does_not_know(installed: Installed) -> None:
    with pytest.raises(ConfigError, match="install a newer yunchang"):
        kernels.resolve("FLASHINFER")


@pytest.mark.parametrize("package, name", (("yunchang", "FA"), ("xfuser", "FLASH_4")))
def test_a_missing_collection_is_named(
    installed: Installed, monkeypatch: pytest.MonkeyPatch, package: str, name: str
) -> None:
    for module in list(sys.modules):
        if module.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"install {package}"):
        kernels.resolve(name)


def test_low_precision_is_not_used_where_it_is_not_wanted(installed: Installed) -> None:
    q, k, v = torch.randn(3, 2, 5, 7, 8, dtype=torch.bfloat16).unbind(0)
    asked: list[Any] = []

    def own(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(kwargs["low_precision_attention"])
        return q

    for name, falls_back in (("SAGE_AUTO", True), ("FLASH_4_FP4", True), ("FA", False)):
        kernel = kernels.resolve(name)
        assert kernel is not None
        asked.clear()
        kernel(own, q, k, v, 5, skip_reshape=True, low_precision_attention=False)
        assert asked == [False] * falls_back
        asked.clear()
        calls = len(installed.calls)
        kernel.with_lse(q, k, v, scale=1.0, exact=True)
        assert len(installed.calls) - calls == (not falls_back)


def test_an_accelerators_kernel_is_refused_on_the_cpu(installed: Installed) -> None:
    for name in ("FA", "TORCH_FLASH", "FLASH_4"):
        with pytest.raises(ConfigError, match="needs an accelerator"):
            kernels.resolve(name, device=torch.device("cpu"))
