"""A job's starts and ends: attempts.jsonl and the logs beside it. Imports neither torch nor a stage."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import SIGTERM, SIGUSR2, Signals
from typing import Any

from poserelay.errors import UserError

INTERRUPTED = 75
# How our own lines on stderr begin (poserelay.errors).
OWN_WORDS = ("error: ", "stopped: ", "interrupted: ")


def append_event(record: Path, event: str, **values: Any) -> None:
    """Add a row to attempts.jsonl; rows of several processes do not mix. Raises UserError when the disk refuses."""
    row = json.dumps({"event": event, "time": time.time(), **values}) + "\n"
    path = record / "attempts.jsonl"
    try:
        record.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            row = "\n" + row  # after one that a full disk cut off
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(handle, row.encode())
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; make room, then `launch resume`") from error


def read_events(record: Path) -> list[dict[str, Any]]:
    """Rows of attempts.jsonl in the order they were written; a torn one is left out."""
    path = record / "attempts.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "event" in row:
                rows.append(row)
    return rows


def ended_well(events: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last attempt's first process returned 0."""
    ends = [row for row in events if row["event"] == "start" or row.get("rank") == 0]
    return bool(ends) and ends[-1]["event"] == "end" and ends[-1].get("code") == 0


def good_attempt(events: Sequence[Mapping[str, Any]]) -> str | None:
    """The attempt that ended well, if the last one did: what jobs downstream start from."""
    starts = [row for row in events if row["event"] == "start"]
    return str(starts[-1].get("attempt")) if starts and ended_well(events) else None


def requeues(events: Sequence[Mapping[str, Any]]) -> int:
    """How often the launcher has started the job again since it was last submitted."""
    last = max((place for place, row in enumerate(events) if row["event"] == "submitted"), default=-1)
    return sum(row["event"] == "end" and bool(row.get("requeued")) for row in events[last + 1 :])


def failures(events: Sequence[Mapping[str, Any]], attempt: str) -> list[Mapping[str, Any]]:
    """Ends of an attempt's processes that are neither a success nor an interruption."""
    return [
        row
        for row in events
        if row["event"] == "end" and row.get("attempt") == attempt and not is_interruption(row.get("code"))
        if row.get("code") != 0
    ]


def is_interruption(code: int | None) -> bool:
    """Whether an exit code says that a signal stopped the process with everything saved, or before it had begun."""
    return code in (INTERRUPTED, -SIGTERM, -SIGUSR2)


def reason_of(code: int, log: Path, offset: int) -> str:
    """Why a process ended, in one line: its own words since `offset` of its log, or what the exit code says."""
    lines: list[str] = []
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(offset, log.stat().st_size - 100_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line for line in lines if line.startswith(OWN_WORDS)]
    if own:
        return own[-1].partition(": ")[2]
    if code < 0:
        name = Signals(-code).name if -code in set(Signals) else f"signal {-code}"
        return f"killed by {name}" + (" (out of memory, or by hand)" if name == "SIGKILL" else "")
    return f"exit code {code}" + (f": {lines[-1]}" if lines else "")
