"""What `evaluation diagnose` found, read back and drawn as charts of a report. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from poserelay.errors import UserError

from .report_charts import Dots, Line, bar_chart, dot_chart, line_chart
from .report_runs import read_object, reason

KINDS = ("good", "jitter", "inversion", "miss", "swap")
KIND_COLOURS = ("#D9D9D9", "#56B4E9", "#E69F00", "#4D4D4D", "#CC79A7")
"""Of falling and rising lightness in turns, so that neighbours stay apart without their hue."""
GAINS = {"score": "optimal scores", "background_fp": "no false positives", "background_fn": "no false negatives"}
"""In words, where the name does not say it."""
GROUPINGS = {
    "size": "size of the person",
    "crowding": "others whose boxes overlap",
    "visible_joints": "number of labelled joints",
}
MOST_CONFUSED = 6


class Joint(NamedTuple):
    """Of one joint."""

    name: str
    shares: list[float]
    """As `KINDS` are ordered."""
    labels: int


class Part(NamedTuple):
    """Persons of one size, say."""

    name: str
    persons: int
    ap: float | None


class Bin(NamedTuple):
    """Poses of similar score."""

    poses: int
    score: float
    oks: float


class Diagnosis(NamedTuple):
    """The parts of diagnosis.json that a report shows; empty where a part is not there."""

    ap: float | None
    """Of the predictions that were diagnosed."""
    shares: list[float]
    labels: int
    joints: list[Joint]
    confused: list[str]
    """In words, the most frequent first."""
    gains: dict[str, float]
    """AP gained by correcting each."""
    bins: list[Bin]
    error: float | None
    spearman: float | None
    background: dict[str, int]
    parts: dict[str, list[Part]]


def read_diagnosis(path: Path) -> Diagnosis:
    """Raises UserError that tells what is wrong with the file."""
    return parsed(read_object(path))


def parsed(content: Mapping[str, Any]) -> Diagnosis:
    """What `diagnose.diagnose` returns. Raises UserError where a number is none or a part has another form."""
    try:
        errors, calibration = content["errors"], content.get("calibration") or {}
        overall = _shares(errors["all"])
        joints = [
            Joint(str(name), shares, int(_finite(its["labels"])))
            for name, its in errors["joints"].items()
            if (shares := _shares(its)) is not None
        ]
        confused = sorted(errors.get("confused") or [], key=lambda its: -int(its["count"]))[:MOST_CONFUSED]
        gains = {
            str(name): gain for name, its in content["gains"].items() if (gain := _optional(its["AP"])) is not None
        }
        bins = [
            Bin(int(_finite(its["poses"])), _finite(its["score"]), _finite(its["oks"]))
            for its in calibration.get("bins") or []
            if its["poses"] and its["score"] is not None and its["oks"] is not None
        ]
        parts = {
            str(name): [Part(str(its["name"]), int(_finite(its["persons"])), _optional(its["AP"])) for its in found]
            for name, found in (content.get("by") or {}).items()
            if name in GROUPINGS
        }
        background = {
            str(name): int(value)
            for name, value in (content.get("background") or {}).items()
            if isinstance(value, int) and not isinstance(value, bool)
        }
        return Diagnosis(
            _optional((content.get("metrics") or {}).get("AP")),
            overall or [],
            int(_finite(errors.get("labels") or 0)),
            joints,
            [_in_words(its) for its in confused],
            gains,
            bins,
            _optional(calibration.get("error")),
            _optional(calibration.get("spearman")),
            background,
            parts,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"damaged ({reason(error)}); `python -m evaluation diagnose` writes it anew") from error


def mean_diagnosis(found: Sequence[Diagnosis]) -> Diagnosis:
    """Of runs that differ in their seed alone, what charts show of all of them: shares, gains and AP by parts."""
    shares = [its.shares for its in found if its.shares]
    gains = dict.fromkeys(name for its in found for name in its.gains)
    parts: dict[str, list[Part]] = {}
    for grouping in dict.fromkeys(name for its in found for name in its.parts):
        listed = [part for its in found for part in its.parts.get(grouping, [])]
        for name in dict.fromkeys(part.name for part in listed):
            alike = [part for part in listed if part.name == name]
            parts.setdefault(grouping, []).append(Part(name, alike[0].persons, _mean(part.ap for part in alike)))
    return found[0]._replace(
        shares=[statistics.fmean(column) for column in zip(*shares, strict=True)],
        gains={name: statistics.fmean(its.gains[name] for its in found if name in its.gains) for name in gains},
        parts=parts,
    )


def errors_chart(rows: Sequence[tuple[str, Diagnosis]]) -> str:
    """A bar for each evaluation: the kinds of all its labelled joints."""
    shown = [(title, its.shares) for title, its in rows if its.shares]
    told = ". ".join(f"{title}: {_told(shares)}" for title, shares in shown)
    heading = "Kinds of error, % of labelled joints of persons that a pose is matched to"
    return bar_chart(heading, shown, KINDS, KIND_COLOURS, description=told)


def joints_chart(diagnosis: Diagnosis) -> str:
    """A bar for each joint of one evaluation."""
    rows = [(joint.name, joint.shares) for joint in diagnosis.joints]
    told = ". ".join(f"{joint.name}: {_told(joint.shares)}" for joint in diagnosis.joints)
    return bar_chart("Kinds of error by joint, %", rows, KINDS, KIND_COLOURS, description=told)


def gains_chart(rows: Sequence[tuple[str, Diagnosis, int]]) -> str:
    """What correcting each kind of error would add to AP: (title, diagnosis, style)."""
    names = list(dict.fromkeys(name for _, its, _ in rows for name in its.gains))
    dots = [Dots(title, [its.gains.get(name) for name in names], style) for title, its, style in rows]
    told = ". ".join(
        f"{title}: " + ", ".join(f"{GAINS.get(name, name)} {gain:+.3f}" for name, gain in its.gains.items())
        for title, its, _ in rows
    )
    labels = [GAINS.get(name, name) for name in names]
    heading = "AP gained by correcting one thing alone"
    return dot_chart(heading, labels, dots, "AP gained", description=told)


def calibration_chart(rows: Sequence[tuple[str, Diagnosis, int]]) -> str:
    """Mean OKS of poses of similar score; where a score is the OKS there is a dotted line."""
    lines = [
        Line(title, [its.score for its in found.bins], [its.oks for its in found.bins], style)
        for title, found, style in rows
        if found.bins
    ]
    told = ". ".join(
        f"{title}: "
        + ", ".join(f"{its.oks:.2f} at {its.score:.2f}" for its in found.bins)
        + (f", calibration error {found.error:.3f}" if found.error is not None else "")
        for title, found, _ in rows
    )
    high = max([1.0, *(x for line in lines for x in line.xs)])
    return line_chart(
        "Mean OKS of poses by their score",
        lines,
        "mean score",
        description=told,
        x_range=(min([0.0, *(x for line in lines for x in line.xs)]), high),
        y_range=(0.0, 1.0),
        marks=True,
        diagonal=high == 1.0,
    )


def parts_chart(grouping: str, rows: Sequence[tuple[str, Diagnosis, int]]) -> str:
    """AP by size, crowding or number of labelled joints."""
    listed = [part for _, its, _ in rows for part in its.parts.get(grouping, []) if part.persons]
    names = list(dict.fromkeys(part.name for part in listed))
    found = [(title, {part.name: part for part in its.parts.get(grouping, [])}, style) for title, its, style in rows]
    dots = [
        Dots(title, [its[name].ap if name in its else None for name in names], style) for title, its, style in found
    ]
    persons = {name: next(its[name].persons for _, its, _ in found if name in its) for name in names}
    told = ". ".join(
        f"{title}: " + ", ".join(f"{name} {_or_dash(its[name].ap)}" for name in names if name in its)
        for title, its, _ in found
    )
    heading = f"AP by {GROUPINGS[grouping]} (persons)"
    labels = [f"{name} ({persons[name]:,})" for name in names]
    return dot_chart(heading, labels, dots, "AP", description=told)


def _shares(content: Mapping[str, Any]) -> list[float] | None:
    """In the order of `KINDS`; None where nothing is measured."""
    found = [_optional(content[kind]) for kind in KINDS]
    shares = [share for share in found if share is not None]
    if any(not 0 <= share <= 1 + 1e-9 for share in shares) or sum(shares) > 1 + 1e-6:
        raise ValueError(f"shares {shares} are not in 0..1")
    return shares if len(shares) == len(KINDS) else None


def _in_words(confused: Mapping[str, Any]) -> str:
    whose = "" if confused.get("whose") == "own" else "another person's "
    return f"{confused['predicted']} at {whose}{confused['at']} ({int(confused['count']):,})"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _told(shares: Sequence[float]) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in zip(KINDS, shares, strict=True))


def _or_dash(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3f}"


def _optional(value: Any) -> float | None:
    return None if value is None else _finite(value)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
