"""A prompt of an example workflow while it is made."""

from __future__ import annotations

from typing import Any

Link = list[Any]
SCENE = "A red fox runs through fresh snow at sunrise, long shadows, cinematic"
NOT = "blurry, low quality, distorted"


class Prompt:
    """Collects nodes; `add` gives the number of a node, and `out` one of its outputs."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, kind: str, title: str = "", **inputs: Any) -> Link:
        """A node; its first output."""
        number = str(len(self.nodes) + 1)
        entry: dict[str, Any] = {"class_type": kind, "inputs": inputs}
        if title:
            entry["_meta"] = {"title": title}
        self.nodes[number] = entry
        return [number, 0]

    def pool(self, workers: int = 2, *, ulysses: int = 2, cfg: int = 1, sharded: bool = False) -> Link:
        """Ray Init Actor; both degrees 0 for data parallel."""
        return self.add(
            "RayInitializer",
            ray_cluster_address="local",
            ray_cluster_namespace="default",
            GPU=workers,
            ulysses_degree=ulysses,
            ring_degree=1 if ulysses else 0,
            cfg_degree=cfg,
            sync_ulysses=False,
            FSDP=sharded,
            FSDP_CPU_OFFLOAD=False,
            XFuser_attention="TORCH",
            ray_object_store_gb=0.0,
        )

    def model(self, pool: Link, file: str) -> Link:
        """Load Diffusion Model (Ray)."""
        return self.add("RayUNETLoader", unet_name=file, weight_dtype="default", ray_actors_init=pool)

    def everything(self, file: str) -> tuple[Link, Link, Link]:
        """Load Model (all GPUs): model, text encoder and VAE."""
        number, _ = self.add("RayModel", model_name=file, gpus="all", goal="auto")
        return [number, 0], [number, 1], [number, 2]

    def plainly(self, model: Link, positive: Link, negative: Link, latent: Link, **changes: Any) -> Link:
        """ComfyUI's KSampler."""
        values = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
        return self.add(
            "KSampler",
            **{**values, **changes},
            model=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
        )

    def texts(self, clip: Link, positive: str = SCENE, negative: str = NOT) -> tuple[Link, Link]:
        """Both prompts."""
        return (
            self.add("CLIPTextEncode", "Prompt", text=positive, clip=clip),
            self.add("CLIPTextEncode", "Negative prompt", text=negative, clip=clip),
        )

    def sampled(self, model: Link, positive: Link, negative: Link, latent: Link, **changes: Any) -> Link:
        """XFuser KSampler (Advanced)."""
        values: dict[str, Any] = {
            "add_noise": "enable",
            "noise_seed": 1,
            "steps": 20,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "simple",
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
            **changes,
        }
        return self.add(
            "XFuserKSamplerAdvanced",
            **values,
            ray_actors=model,
            positive=positive,
            negative=negative,
            latent_image=latent,
        )

    def custom(self, model: Link, positive: Link, negative: Link, latent: Link, *, sigmas: Link, cfg: float) -> Link:
        """XFuser SamplerCustom."""
        given = self._custom(positive, negative, latent, sigmas=sigmas, cfg=cfg)
        return self.add("XFuserSamplerCustom", ray_actors=model, **given)

    def plainly_custom(
        self, model: Link, positive: Link, negative: Link, latent: Link, *, sigmas: Link, cfg: float
    ) -> Link:
        """ComfyUI's SamplerCustom."""
        given = self._custom(positive, negative, latent, sigmas=sigmas, cfg=cfg)
        return self.add("SamplerCustom", model=model, **given)

    def _custom(self, positive: Link, negative: Link, latent: Link, *, sigmas: Link, cfg: float) -> dict[str, Any]:
        return {
            "add_noise": True,
            "noise_seed": 1,
            "cfg": cfg,
            "positive": positive,
            "negative": negative,
            "sampler": self.add("KSamplerSelect", sampler_name="euler"),
            "sigmas": sigmas,
            "latent_image": latent,
        }

    def decoded(self, model: Link, latent: Link, file: str, **changes: Any) -> Link:
        """Distributed VAE (Ray)."""
        values: dict[str, Any] = {
            "vae_dtype": "auto",
            "tile_size": 512,
            "overlap": 64,
            "temporal_size": 64,
            "temporal_overlap": 8,
        }
        return self.add(
            "RayVAEDecodeDistributed",
            ray_actors=model,
            samples=latent,
            vae_name=file,
            **values,
            release_vae=True,
            **changes,
        )

    def video(self, images: Link, fps: float, **more: Any) -> None:
        """Create and save a video."""
        made = self.add("CreateVideo", images=images, fps=fps, **more)
        self.add("SaveVideo", video=made, filename_prefix="raylight", format="auto", codec="auto")

    def picture(self, images: Link) -> None:
        """Save pictures."""
        self.add("SaveImage", images=images, filename_prefix="raylight")
