"""Models in several files: which files belong together, and whether they are all of a model."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..raylight.config import ModelSpec
from ..raylight.errors import LoadError
from .files import opened
from .header import SAFETENSORS, Entry, Header, read_header

PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^.]+)")
"""How parts are named, of safetensors and of GGUF alike."""
INDEX, MAP = ".index.", "weight_map"
"""In the name of the JSON file beside parts of safetensors, and what in it says which tensor is in which of them."""
INDEX_BYTES = 100_000_000
"""As much as the header of a safetensors file may have."""
TOGETHER = "Put all parts of the model into one folder, under the names they were published with"


def spec_of(path: str, **options: Any) -> ModelSpec:
    """Describe the model that a file is, or is a part of; whichever part is named, the spec is the same.

    Args:
        options: the other fields.

    Raises:
        LoadError: the file, or another part, is missing, cannot be read, or is not what an index says.
    """
    first, *others = _parts(os.path.abspath(path))
    return ModelSpec.of(first, others=others, **options)


def joined(headers: Sequence[Header], starts: Sequence[int]) -> Header:
    """The header of a model in parts.

    Args:
        starts: where each file begins among the bytes of all.

    Raises:
        LoadError: parts are of different models, or one is missing.
    """
    _check_split(headers)
    if len(headers) == 1:
        return headers[0]
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for header, start in zip(headers, starts, strict=True):
        for name, entry in header.entries.items():
            if name in entries:
                _refuse(header, f"tensor {name!r} is in another part as well")
            entries[name] = dataclasses.replace(entry, start=start + entry.start, stop=start + entry.stop)
        metadata = {**header.metadata, **metadata}  # the first part's count
    size = starts[-1] + headers[-1].size
    return Header(headers[0].path, size, entries, metadata, headers[0].format)


def _parts(path: str) -> list[str]:
    folder, name = os.path.split(path)
    named = PART.fullmatch(name)
    if named is None:
        return [path]
    number, count = int(named["number"]), int(named["count"])
    if count < 2 or not 1 <= number <= count:
        return [path]
    index = _index(folder, name) if named["suffix"].lower() in SAFETENSORS else {}
    names = sorted(set(index.values())) or [
        f"{named['name']}-{part:05}-of-{count:05}{named['suffix']}" for part in range(1, count + 1)
    ]
    missing = [part for part in names if not os.path.isfile(os.path.join(folder, part))]
    if missing:
        raise LoadError(
            f"{name} is a part of a model in {len(names)} files, and {_several(missing)} missing",
            f"looked in {folder}",
            f"{TOGETHER}, or choose a file that holds the whole model",
        )
    paths = [os.path.join(folder, part) for part in names]
    if index:
        _check_index(paths, index)
    return paths


def _index(folder: str, name: str) -> Mapping[str, str]:
    """Files by tensor, of the index that names a part; {} where there is none."""
    for other in sorted(os.listdir(folder)):
        if not (INDEX in other and other.endswith(".json")):
            continue
        path = os.path.join(folder, other)
        try:
            if os.path.getsize(path) > INDEX_BYTES:
                continue
            with open(path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError):
            continue  # it is another program's, or the parts' names must do
        files = found.get(MAP) if isinstance(found, dict) else None
        if isinstance(files, dict) and name in files.values():
            outside = [part for part in files.values() if not isinstance(part, str) or part != os.path.basename(part)]
            if outside:
                raise LoadError(
                    f"{other} cannot be used", f"it names {outside[0]!r}, which is no file beside it", TOGETHER
                )
            return files
    return {}


def _check_index(paths: Sequence[str], index: Mapping[str, str]) -> None:
    """Parts of two downloads may have each other's names."""
    there: set[tuple[str, str]] = set()
    for path in paths:
        with opened(path) as fd:
            there |= {(name, os.path.basename(path)) for name in read_header(path, fd).entries}
    lacking = [(name, part) for name, part in index.items() if (name, part) not in there]
    if lacking:
        name, part = lacking[0]
        raise LoadError(
            f"{part} is not the part that the model's index means",
            f"tensor {name!r} should be in it, and is not ({len(lacking)} of {len(index)} are missing)",
            "Get all parts and the index from one source",
        )


def _check_split(headers: Sequence[Header]) -> None:
    """GGUF files say which part they are."""
    for place, header in enumerate(headers):
        split = header.split
        if split.count > 1 and len(headers) == 1:
            _refuse(
                header,
                f"it is part {split.number + 1} of {split.count} of a model, and the others are found by its name, "
                f"which would have to end in -{split.number + 1:05}-of-{split.count:05}.gguf",
            )
        if split.count > 1 and (split.count, split.number) != (len(headers), place):
            _refuse(
                header,
                f"it says that it is part {split.number + 1} of {split.count}, and its name that it is {place + 1} of "
                f"{len(headers)}",
            )
    wanted, found = headers[0].split.tensors, sum(len(header.entries) for header in headers)
    if wanted not in (0, found) and headers[0].split.count > 1:
        _refuse(headers[0], f"the parts hold {found} tensors, and the model has {wanted}")


def _refuse(header: Header, why: str) -> None:
    raise LoadError(f"{os.path.basename(header.path)} cannot be loaded", why, TOGETHER)


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} {'is' if len(names) == 1 else 'are'}"
