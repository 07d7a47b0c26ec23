"""Parity cases, a module per group of families; `CASES` is all of them."""

from . import (
    chroma,
    controls,
    cosmos,
    even,
    flux,
    half,
    hunyuan,
    images,
    ltx,
    lumina,
    mmdit,
    qwen,
    sounds,
    videos,
    wan,
    wan_variants,
)

CASES = (
    *even.CASES,
    *half.CASES,
    *wan.CASES,
    *wan_variants.CASES,
    *flux.CASES,
    *chroma.CASES,
    *hunyuan.CASES,
    *qwen.CASES,
    *ltx.CASES,
    *sounds.CASES,
    *videos.CASES,
    *images.CASES,
    *mmdit.CASES,
    *cosmos.CASES,
    *lumina.CASES,
    *controls.CASES,
)
