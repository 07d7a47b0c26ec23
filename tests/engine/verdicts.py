"""Whether what `ranks` reports of a case is right, and a summary of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .case import TOLERANCE, Case
from .meshes import ALONE, MESHES, meshes_of

AGREEING = ("u2", "u3", "u2r2")
"""Meshes on which the modes of a case are compared with each other."""


@dataclass(frozen=True)
class Summary:
    """Names of cases and of what else was compared; of those that are not right, with the reason."""

    right: Sequence[str]
    wrong: Mapping[str, str]
    unbuilt: Mapping[str, str]
    absent: Sequence[str]

    @property
    def bad(self) -> bool:
        """Whether anything is wrong or could not be built."""
        return bool(self.wrong or self.unbuilt)

    def text(self) -> str:
        """A line of names for each kind, and one for each that is not right."""
        lines = [f"right: {len(self.right)}", *([f"  {' '.join(self.right)}"] if self.right else [])]
        for title, found in (("wrong", self.wrong), ("not built", self.unbuilt)):
            lines.append(f"{title}: {len(found)}")
            lines += [f"  {name}: {why}" for name, why in found.items()]
        lines.append(f"not for this host: {len(self.absent)}")
        lines += [f"  {' '.join(self.absent)}"] if self.absent else []
        return "\n".join(lines) + "\n"


def summary(cases: Sequence[Case], report: Mapping[str, Any]) -> Summary:
    """Right and wrong of a report of `ranks`."""
    compared = [case for case in cases if case.name not in report["unbuilt"] and case.name not in report["absent"]]
    verdicts: dict[str, str] = {}
    for case in compared:
        found = {mesh: wrong(case, mesh, report) or apart(case, mesh, report) for mesh in meshes_of(case)}
        verdicts[case.name] = by_reason({mesh: last_line(why) for mesh, why in found.items() if why})
    for name, error in report["alone"].items():
        verdicts[f"alone {name}"] = last_line(wrong_alone(name, error))
    for model, sizes in report.get("rows", {}).items():
        why = {f"{size} ranks": last_line(wrong_rows(ranks)) for size, ranks in sizes.items() if wrong_rows(ranks)}
        verdicts[f"rows {model}"] = by_reason(why)
    return Summary(
        right=[name for name, why in verdicts.items() if not why],
        wrong={name: why for name, why in verdicts.items() if why},
        unbuilt={name: last_line(why) for name, why in report["unbuilt"].items()},
        absent=report["absent"],
    )


def by_reason(found: Mapping[str, str]) -> str:
    """Places and what was wrong there, in one line."""
    places: dict[str, list[str]] = {}
    for place, why in found.items():
        places.setdefault(why, []).append(place)
    return "; ".join(f"{', '.join(names)}: {why}" for why, names in places.items())


def last_line(text: str) -> str:
    """The part of a traceback that says what went wrong."""
    return text.strip().rpartition("\n")[2]


def tables_of(ranks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the ranks found, of those that came to the end."""
    return [table for table in ranks.values() if isinstance(table, dict)]


def wrong(case: Case, mesh: str, report: Mapping[str, Any]) -> str:
    """Why a case that was built is wrong on a mesh, or ""."""
    ranks = report["ranks"][mesh]
    if why := broken(case, mesh, ranks):
        return why
    ulysses, ring = MESHES[mesh]
    modes = tables_of(ranks)[0][case.name]
    if list(modes) != case.modes_on(mesh, ulysses * ring):
        return f"only {list(modes)} was run"
    raises = case.raises or (case.ring_raises if ring > 1 else "")
    tolerance = case.rounded * report["noise"][case.name] if case.half else case.tolerance
    for mode, result in modes.items():
        if raises:
            if result.get("raised") != raises:
                return f"{mode}: {raises} is to be raised, not {result.get('raised', 'nothing')}"
            if not result["clean"] <= case.tolerance:
                return f"{mode}: the forward after {raises} differs by {result['clean']:.1e}"
        elif case.wrong:
            if not (case.loud and "raised" in result) and not result.get("error", 0.0) > 10 * case.tolerance:
                return f"{mode}: nobody would see what this case does wrong, {result}"
        elif not result["error"] <= tolerance:
            return f"{mode}: differs by {result['error']:.1e}, {tolerance:.1e} is allowed"
        elif not result["same"]:
            return f"{mode}: ranks returned different bytes"
    return ""


def broken(case: Case, mesh: str, ranks: Mapping[str, Any]) -> str:
    """Why there is nothing to compare of a case on a mesh, or "" where its ranks came through together."""
    tables = tables_of(ranks)
    if not tables:
        return next(iter(ranks.values()))
    for mode in tables[0][case.name]:
        on_all = [table[case.name].get(mode, {}) for table in tables]
        broke = {rank: found["broke"] for rank, found in enumerate(on_all) if "broke" in found}
        if broke and not (case.wrong and case.loud):
            # a rank that only lost its connections raises as well, and is not the one that matters
            first = min(broke, key=lambda rank: ("onnection" in last_line(broke[rank]), rank))
            lines = [f"{mode}: {len(broke)} ranks of {mesh} did not come through, one of them:", broke[first].strip()]
            if "lost" in on_all[first]:
                lines += [text for text in ranks.values() if isinstance(text, str)]
            return "\n".join(lines)
        counts = [found.get("collectives") for found in on_all]
        if not broke and len(set(counts)) > 1:
            return f"{mode}: ranks made other numbers of collectives, {counts}"
    return ""


def apart(case: Case, mesh: str, report: Mapping[str, Any]) -> str:
    """How modes of a case that is right differ: switches change no bit, and the engine chooses a right granularity."""
    modes = tables_of(report["ranks"][mesh])[0][case.name]
    expected = "trunk" if "trunk" in case.modes else "block"
    if mesh not in AGREEING or expected not in modes or case.raises or "raised" in modes[expected]:
        return ""
    for mode in ("auto", "turns", "synced", "wrapped"):
        if mode in modes and modes[mode]["bytes"] != modes[expected]["bytes"]:
            return f"{mode} gives other bits than {expected}"
        if mode in modes and mode != "turns" and modes[mode]["collectives"] != modes[expected]["collectives"]:
            return f"{mode} makes another number of collectives than {expected}"
    return ""


def wrong_alone(name: str, error: float | str) -> str:
    """Why a case and kernel of `meshes.ALONE` is wrong on one process, or ""."""
    if isinstance(error, str):
        return error
    case, _, kernel = name.rpartition("-")
    assert kernel in ALONE[case]
    allowed = 0.0 if kernel == "TORCH" else TOLERANCE
    return "" if error <= allowed else f"differs by {error:.1e}, {allowed:.1e} is allowed"


def wrong_rows(ranks: Mapping[str, Any]) -> str:
    """Why ranks that share a picture are wrong in what they send, or ""."""
    for rank, found in ranks.items():
        if isinstance(found, str):
            return found
        if found["sent"] != found["closed form"]:
            return f"rank {rank} sends {found['sent']}, the least is {found['closed form']}"
    return ""
