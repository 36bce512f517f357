"""`python -m evaluation report`: one page about one run or dozens, to be read anywhere, without a network.

What is there is shown, what is damaged is told and left out: an unfinished run, or one that nothing has evaluated, is
no mistake. The page depends on its input alone: the same runs give the same bytes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from poserelay.errors import UserError
from poserelay.run import write_text

from .config import ReportConfig
from .report_diagnosis import Diagnosis, parsed, read_diagnosis
from .report_page import Closer, Report, gather, render
from .report_runs import Measured, RunRecord, read_runs

if TYPE_CHECKING:
    from collections.abc import Callable

    from .report_pictures import Gallery, Looker

Found = TypeVar("Found")

SAME_AP = 1e-4
"""Two AP that differ by less are of the same predictions."""


def main(config: ReportConfig) -> Report:
    """Write the page and return what it shows. Raises UserError for a path that is no run and for unusable truth."""
    out = Path(config.out)
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise UserError(f"out {config.out}: expected a file that ends in .html; name the page")
    records = read_runs(config.runs)
    looker = None
    if config.annotations is not None:
        from .report_pictures import Looker  # needs torch, which takes seconds to import

        looker = Looker(config)
    closer, problems = look_closer(records, looker)
    report = gather(records, closer, problems, command_of(config), metadata.version("poserelay"))
    write_text(out, render(report))
    counts = f"{len(records)} runs, {len(report.entries)} evaluations"
    print(f"{out} written: {counts}, {len(report.warnings)} things to take care of", file=sys.stderr)
    return report


def look_closer(records: Sequence[RunRecord], looker: Looker | None) -> tuple[dict[tuple[str, str], Closer], list[str]]:
    """Diagnosis and gallery of every evaluation, by the names of its run and of itself, and what went wrong."""
    found: dict[tuple[str, str], Closer] = {}
    problems: list[str] = []

    def attempt(name: str, read: Callable[[], Found]) -> Found | None:
        try:
            return read()
        except UserError as error:
            problems.append(f"{name}: {error}")
            return None

    for record in records:
        for measured in record.measured:
            folder = measured.folder
            if folder is None:
                continue
            file = folder / "diagnosis.json"
            diagnosis: Diagnosis | None = None
            gallery: Gallery | None = None
            others: list[str] = []
            if file.exists():
                diagnosis = attempt(f"{record.name}: {file}", lambda file=file: read_diagnosis(file))
            if looker is not None and (folder / "predictions.json").exists():
                results = attempt(record.name, lambda folder=folder, looker=looker: looker.results(folder))
                if results is not None:
                    others = other_truth(record, measured, looker)
                    problems += others
                    if diagnosis is None:
                        again = attempt(record.name, lambda its=results, looker=looker: parsed(looker.diagnosis(its)))
                        diagnosis = again
                    if looker.images is not None:
                        gallery = attempt(record.name, lambda its=results, looker=looker: looker.gallery(its))
            problems += [] if others else other_predictions(record, measured, diagnosis)
            found[record.name, measured.name] = Closer(diagnosis, gallery)
    return found, problems


def other_truth(record: RunRecord, measured: Measured, looker: Looker) -> list[str]:
    """A warning where the metrics are of other persons than those of `annotations`."""
    before, now = measured.protocol.get("instances"), len(looker.truth.counted.persons)
    if before is None or before == now:
        return []
    return [
        f"{record.name}: its metrics are of {before} persons, {looker.truth.file.path} has {now}; diagnosis and "
        "pictures are by the latter"
    ]


def other_predictions(record: RunRecord, measured: Measured, diagnosis: Diagnosis | None) -> list[str]:
    """A warning where the diagnosis has another AP than the metrics."""
    before, now = measured.metrics.get("AP"), None if diagnosis is None else diagnosis.ap
    if before is None or now is None or abs(before - now) < SAME_AP:
        return []
    return [
        f"{record.name}: metrics.json has AP {before:.4f}, what is diagnosed has AP {now:.4f}: of other predictions, "
        "annotations or joints; evaluate and diagnose it anew"
    ]


def command_of(config: ReportConfig) -> str:
    """What was typed, or might have been, but for the page's name."""
    words = ["python", "-m", "evaluation", "report", *config.runs]
    words += ["--annotations", config.annotations] if config.annotations is not None else []
    words += ["--images", config.images] if config.images is not None else []
    words += ["--skeleton", config.skeleton] if config.skeleton != "auto" else []
    return shlex.join(words)
