"""Mapped weights on an accelerator against plain ComfyUI: load, hot reload, LoRA switch, GGUF, memory.

    python benchmarks/gpu/weights.py --comfy ROOT [--model wan14b:8] [--rounds 5] [--folder DIR]

Run it with a Python that has ComfyUI's packages and gguf; it installs nothing. The checkpoint has the shape of Wan
14B with fewer layers and random weights, in bf16, and its pages are in the page cache. One process, one device; the
host's peak is anonymous memory, since pages of the file are the kernel's.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from models import Choice
from ranks import enter
from tables import Table

MB = 1 << 20


def main() -> int:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfy", type=Path, required=True, help="root of a ComfyUI")
    parser.add_argument("--model", default="wan14b:8", help="name[:layers]; a layer of wan14b has 0.7 GB")
    parser.add_argument("--tokens", default="4096,16384", help="of forwards, multiples of 1024, comma-separated")
    parser.add_argument("--rounds", type=int, default=5, help="to take the median of")
    parser.add_argument("--folder", type=Path, help="for the files (default: a temporary one)")
    options = parser.parse_args()
    enter(str(options.comfy.resolve()))
    import torch
    from comfy import model_management

    device = model_management.get_torch_device()
    with tempfile.TemporaryDirectory() as temporary:
        folder, comfy = options.folder or Path(temporary), options.comfy.resolve()
        tokens = [int(count) for count in options.tokens.split(",")]
        run = Run(comfy, folder, device, choice=Choice.parse(options.model), tokens=tokens, rounds=options.rounds)
        print(f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else device}, torch {torch.__version__}")
        print(f"checkpoint: {run.size / 1e9:.2f} GB, {run.choice}, median of {options.rounds}\n")
        run.loading()
        run.loras()
        run.gguf()
    return 0


class Run:
    """The files, and one table per method."""

    def __init__(
        self, comfy: Path, folder: Path, device: Any, *, choice: Choice, tokens: Sequence[int], rounds: int
    ) -> None:
        self.comfy, self.folder, self.device, self.rounds = comfy, folder, device, rounds
        self.choice, self.tokens = choice, tokens
        self.file = self.choice.file(comfy, folder)
        self.size = self.file.stat().st_size

    # ---- the two sides ---------------------------------------------------------------------------

    def plain(self) -> Any:
        """ComfyUI's own patcher, loaded and resident."""
        import comfy.sd
        import comfy.utils
        import torch
        from comfy import model_management
        from comfy_raylight.workers.mapping.loading import load_options

        _, keywords = load_options(self.spec(self.file))
        with torch.inference_mode():
            state, metadata = comfy.utils.load_torch_file(str(self.file), return_metadata=True)
            patcher = comfy.sd.load_diffusion_model_state_dict(state, {}, metadata=metadata, **keywords)
            model_management.load_models_gpu([patcher], force_full_load=True)
        return patcher

    def spec(self, path: Path, **fields: Any) -> Any:
        from comfy_raylight.raylight.config import ModelSpec

        return ModelSpec.of(path, **fields)

    def mapped(self, path: Path) -> Any:
        """A worker's model, loaded and resident."""
        from comfy_raylight.raylight.config import ParallelConfig
        from comfy_raylight.raylight.mesh import Mesh
        from comfy_raylight.workers.mapping import meta_model
        from comfy_raylight.workers.mapping.loading import normal_tensors
        from comfy_raylight.workers.worker.model import WorkerModel

        spec = self.spec(path)
        dtype = meta_model.build(spec)[0].get_dtype()
        with normal_tensors():
            model = WorkerModel(spec, dtype, Mesh.single(ParallelConfig(world=1)), None)
            model.make_resident(room=0)
        return model

    def forward(self, model: Any, tokens: int) -> Any:
        """The output of a BaseModel for a video of so many tokens."""
        import torch

        generator = torch.Generator(self.device).manual_seed(0)
        dtype = model.manual_cast_dtype or model.get_dtype()
        draw = {"generator": generator, "device": self.device, "dtype": dtype}
        x = torch.randn(1, 16, tokens // 1024, 64, 64, **draw)
        context = torch.randn(1, 512, 4096, **draw)
        t = torch.tensor([500.0], device=self.device)
        with torch.inference_mode():
            return model.diffusion_model(x, t, context, transformer_options={})

    # ---- measuring -------------------------------------------------------------------------------

    def seconds(self, action: Callable[[], Any], *, after: Callable[[], Any] = lambda: None) -> float:
        """Median of an action's seconds until the device is idle; `after` puts things back, untimed."""
        found = []
        for _ in range(self.rounds + 1):  # the first one warms up
            self.idle()
            began = time.perf_counter()
            kept = action()
            self.idle()
            found.append(time.perf_counter() - began)
            del kept
            after()
            gc.collect()
        return statistics.median(found[1:])

    def idle(self) -> None:
        from comfy_raylight.workers.wire.link_test import finish

        finish(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on the device; 0 of a CPU, on which this script can be tried."""
        import torch

        gc.collect()
        if self.device.type == "cpu":
            return 0
        return int(torch.get_device_module(self.device).memory_allocated(self.device))

    def free(self) -> None:
        """Nothing on the device."""
        from comfy import model_management

        model_management.unload_all_models()
        gc.collect()
        model_management.soft_empty_cache()

    def link(self) -> float:
        """GB/s from page-locked memory to the device: what no load can beat."""
        import torch

        host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=self.device.type != "cpu")
        target = torch.empty(1 << 30, dtype=torch.uint8, device=self.device)
        return (1 << 30) / 1e9 / self.seconds(lambda: target.copy_(host, non_blocking=True))

    # ---- tables ----------------------------------------------------------------------------------

    def loading(self) -> None:
        """Load, reload, and what is left where."""
        link = self.link()
        plain_load, plain_again, plain_held, expected = self._plain_loading()
        load, reload, leaving, held, left, equal = self._mapped_loading(expected)
        print(f"Link, page-locked: {link:.1f} GB/s. Output has plain ComfyUI's bits, loaded and reloaded: {equal}\n")
        table = Table("weights", ["", "plain s", "mapped s", "ratio", "mapped GB/s", "of the link"], of=".0%")
        for name, theirs, ours in (("load", plain_load, load), ("reload after offload", plain_again, reload)):
            rate = self.size / 1e9 / ours
            table.row(name, theirs, ours, theirs / ours, rate, rate / link)
        print(f"\nOffload: {leaving * 1e3:.0f} ms, {left / MB:.1f} MB left on the device.")
        print(f"Anonymous host memory held: plain {plain_held / MB:.0f} MB, mapped {held / MB:.0f} MB\n")

    def _plain_loading(self) -> tuple[float, float, int, Any]:
        import torch
        from comfy import model_management

        anonymous = anonymous_bytes()
        load = self.seconds(self.plain, after=self.free)
        patcher = self.plain()
        held = anonymous_bytes() - anonymous
        expected = self.forward(patcher.model, self.tokens[0]).cpu()

        def again() -> None:
            with torch.inference_mode():
                model_management.load_models_gpu([patcher], force_full_load=True)

        self.free()
        return load, self.seconds(again, after=self.free), held, expected

    def _mapped_loading(self, expected: Any) -> tuple[float, float, float, int, int, bool]:
        import torch
        from comfy_raylight.workers.mapping.loading import normal_tensors

        self.free()
        before, anonymous = self.allocated(), anonymous_bytes()
        load = self.seconds(lambda: self.mapped(self.file), after=self.free)
        model = self.mapped(self.file)
        outputs = [self.forward(model.patcher.model, self.tokens[0]).cpu()]

        def offload() -> None:
            with normal_tensors():
                model.offload()

        def resident() -> None:
            with normal_tensors():
                model.make_resident(room=0)

        leaving = self.seconds(offload, after=resident)
        offload()
        left, held = self.allocated() - before, anonymous_bytes() - anonymous
        reload = self.seconds(resident, after=offload)
        resident()
        outputs.append(self.forward(model.patcher.model, self.tokens[0]).cpu())
        return load, reload, leaving, held, left, all(torch.equal(output, expected) for output in outputs)

    def loras(self) -> None:
        """Exchange one of two LoRAs."""
        import torch

        sets, theirs, expected = self._plain_switch()
        self.free()
        ours, output = self._mapped_switch(sets)
        table = Table("loras", ["exchange one of two LoRAs", "plain s", "mapped s", "ratio", "equal bits"])
        table.row(f"{len(sets[0])} weights", theirs, ours, theirs / ours, torch.equal(output, expected))
        self.free()

    def _plain_switch(self) -> tuple[list[dict[str, Any]], float, Any]:
        """Two patch sets, seconds from one to the other, and the output with the first."""
        import comfy.sd
        import comfy.utils
        import torch
        from comfy import model_management
        from comfy_raylight.tests.weights.adapters import write_adapter

        parts = ("self_attn", "cross_attn", "ffn")
        files = [write_adapter(self.file, self.folder / f"{part}.safetensors", "lora", part=part) for part in parts]
        loaded = [comfy.utils.load_torch_file(str(file), safe_load=True) for file in files]
        patcher = self.plain()
        with_one = comfy.sd.load_lora_for_models(patcher, None, loaded[0], 0.7, 0)[0]
        sets = [comfy.sd.load_lora_for_models(with_one, None, lora, 0.7, 0)[0] for lora in loaded[1:]]
        turn = iter(range(1000))

        def switch(number: int | None = None) -> None:
            chosen = next(turn) % 2 if number is None else number
            with torch.inference_mode():
                model_management.load_models_gpu([sets[chosen]], force_full_load=True)

        seconds = self.seconds(switch)
        switch(0)
        return [one.patches for one in sets], seconds, self.forward(sets[0].model, self.tokens[0]).cpu()

    def _mapped_switch(self, sets: list[dict[str, Any]]) -> tuple[float, Any]:
        from comfy_raylight.workers.mapping.loading import normal_tensors

        model = self.mapped(self.file)
        turn = iter(range(1000))

        def switch(number: int | None = None) -> None:
            count = next(turn)
            with normal_tensors():
                model.patch(f"set {count}", sets[count % 2 if number is None else number], {}, force_cast=False)
                model.make_resident(room=0)

        seconds = self.seconds(switch)
        switch(0)
        return seconds, self.forward(model.patcher.model, self.tokens[0]).cpu()

    def gguf(self) -> None:
        """Seconds of a forward from blocks against one in bf16."""
        whole, size = self._forwards(self.file)
        columns = [
            "GGUF",
            "tokens",
            "unquantised s per forward",
            "from blocks s",
            "ratio",
            "GB on the device",
            "unquantised GB",
        ]
        table = Table("gguf", columns)
        for kind in ("Q8_0", "Q4_K"):
            path = replace(self.choice, kind=kind).file(self.comfy, self.folder)
            taken, held = self._forwards(path)
            for tokens in self.tokens:
                a, b = whole[tokens], taken[tokens]
                table.row(kind, tokens, a, b, a / b, held / 1e9, size / 1e9)

    def _forwards(self, path: Path) -> tuple[dict[int, float], int]:
        """Seconds of a forward by tokens, and bytes of weights on the device."""
        self.free()
        before = self.allocated()
        model = self.mapped(path)
        held = self.allocated() - before
        taken = {tokens: self.seconds(partial(self.forward, model.patcher.model, tokens)) for tokens in self.tokens}
        return taken, held


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    gc.collect()
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Anonymous:"))


if __name__ == "__main__":
    sys.exit(main())
