"""Stable Audio, ACE-Step 1.5 and MiniMax Music 3."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..case import CHOOSES_BLOCK, EVERY, Case, Inputs, build, filled, override, patched, random, run_original
from .changes import as_first_rank, with_sites, without_whole


def stable_audio(**more: Any) -> torch.nn.Module:
    sizes = dict(io_channels=4, embed_dim=160, cond_token_dim=32, global_cond_dim=16, depth=3, num_heads=5)
    model: Any = build("comfy.ldm.audio.dit.AudioDiffusionTransformer", **{**sizes, **more})
    rope = model.transformer.rotary_pos_emb
    rope.inv_freq.copy_(10000 ** -torch.linspace(0, 1, rope.inv_freq.numel()))
    return model


def sound(batch: int = 1, length: int = 44, **more: Any) -> Inputs:
    t = torch.linspace(0.3, 0.6, batch)
    return (random(batch, 4, length), t), {
        "cross_attn_cond": random(batch, 7, 32),
        "global_embed": random(batch, 16),
        **more,
    }


def ace(**more: Any) -> torch.nn.Module:
    sizes = dict(in_channels=24, hidden_size=60, text_hidden_dim=16, timbre_hidden_dim=8, audio_acoustic_hidden_dim=8)
    layers = dict(num_dit_layers=4, num_lyric_layers=1, num_timbre_layers=1, num_tokenizer_layers=1, num_heads=4)
    rest = dict(num_kv_heads=2, head_dim=12, intermediate_size=64, sliding_window=3, fsq_dim=32, fsq_levels=[3, 3])
    encoder = dict(encoder_hidden_size=32, encoder_intermediate_size=64, encoder_num_heads=4)
    path = "comfy.ldm.ace.ace_step15.AceStepConditionGenerationModel"
    return build(path, **{**sizes, **layers, **rest, **encoder, **more})


def song(batch: int = 1, length: int = 45, **more: Any) -> Inputs:
    x, t, context = random(batch, 8, length), torch.linspace(0.3, 0.6, batch), random(batch, 7, 16)
    lyrics = {"lyric_embed": random(batch, 9, 16), "refer_audio": random(batch, 8, length, seed=2)}
    return (x, t, context), {**lyrics, "is_covers": False, **more}


def music(**more: Any) -> torch.nn.Module:
    """The class has one size only: its transformer is made again, in a small one."""
    import comfy.ops
    from comfy.ldm.minimax_music import dit

    place = {"dtype": torch.float32, "device": "cpu", "operations": comfy.ops.disable_weight_init}
    linear = torch.nn.Linear
    model = dit.MiniMaxMusic3DiT(**{**place, "device": "meta"})
    inner = model.diffusion_transformer
    inner.transformer.project_in, inner.transformer.project_out = linear(2304, 60), linear(60, 128)
    inner.to_timestep_embed[2] = linear(2048, 60)
    blocks = [dit.TransformerBlock(60, 12, 64, **place) for _ in range(3)]
    inner.transformer.layers = torch.nn.ModuleList(blocks)
    inner.transformer.rotary_pos_emb = dit.RotaryEmbedding(8, torch.float32, "cpu")
    model = filled(model.to_empty(device="cpu"))
    for name, buffer in model.named_buffers():
        steps = torch.linspace(0, 1, buffer.numel())
        buffer.copy_(10000**-steps if name.endswith("inv_freq") else random(*buffer.shape) * 0.1)
    return model


def played(frames: int = 12, batch: int = 1) -> Inputs:
    from comfy.ldm.minimax_music.dit import latent_length

    x, t = random(batch, 128, latent_length(frames)), torch.linspace(0.3, 0.6, batch)
    return (x, t, random(batch, frames, 8 * 4096) * 0.1, torch.full((batch, 1, 1), 0.8)), {}


ACE = ("comfy.ldm.ace.ace_step15", "")
audio_case = partial(Case, family="AudioDiffusionTransformer", model=stable_audio)
MUSIC = ("comfy.ldm.minimax_music.dit", "class MiniMaxMusic3DiT")
music_case = partial(Case, family="MiniMaxMusic3DiT", model=music, needs=MUSIC, meshes=("u2", "u3", "r2"))
ace_case = partial(Case, family="AceStepConditionGenerationModel", model=ace, needs=ACE)
unwrapped = tuple(mode for mode in EVERY if mode != "wrapped")
ends = (("double_block", 0), ("double_block", 2))

CASES = (
    # its forward calls no wrappers
    audio_case(name="stable_audio", make=sound, modes=unwrapped),
    audio_case(name="stable_audio_batch", make=partial(sound, batch=2)),
    audio_case(name="stable_audio_adaln", model=partial(stable_audio, global_cond_type="adaLN"), make=sound),
    audio_case(
        name="stable_audio_replace", make=partial(patched, sound, partial(run_original, *ends)), modes=CHOOSES_BLOCK
    ),
    audio_case(
        name="stable_audio_override", make=partial(patched, sound, override), base=sound, ring_raises="UnsupportedError"
    ),
    audio_case(name="no_stable_audio_attention", make=sound, change=with_sites, wrong=True, meshes=("u2",)),
    audio_case(
        name="no_stable_audio_rope",
        make=partial(sound, length=45),
        change=partial(as_first_rank, name="rotary_pos_emb"),
        wrong=True,
        meshes=("u2",),
    ),
    ace_case(name="ace_step", make=song),
    ace_case(name="ace_step_batch", make=partial(song, batch=2)),
    ace_case(name="ace_step_cover", make=partial(song, is_covers=True)),
    ace_case(name="ace_step_codes", make=partial(song, is_covers=None, audio_codes=torch.arange(9)[None])),
    ace_case(name="no_ace_step_whole", loud=True, make=song, change=without_whole, wrong=True, meshes=("u2",)),
    music_case(name="music3", make=played),
    music_case(name="music3_batch", make=partial(played, batch=2)),
    # longer than what it takes at once
    music_case(name="music3_windows", make=partial(played, frames=240), modes=("trunk",)),
    music_case(name="no_music3_whole", loud=True, make=played, change=without_whole, wrong=True, meshes=("u2",)),
)
