"""The run directory: configuration, lock, status, metrics and the record of a finished run. Imports no torch.

config.yaml  metrics.jsonl  tensorboard/  resume/{last,previous}.pt  export/model.safetensors  status.json  done.json
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from .errors import CheckFailed, Interrupted, UserError

# Fields that change neither the result nor the identity of a run.
IN_THE_WAY = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
"""What more room on the disk does not mend."""
UNCOMPARED = (
    "run_dir",
    "resume",
    "workers",
    "device",
    "log_every",
    "save_every",
    "knn",
    "on_collapse",
    "max_unreadable",
)


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it into place: a reader sees the old or the new file.

    Raises UserError when the disk refuses (full, read-only); the file that was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors leaves a file that only its owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        remedy = "name another place" if isinstance(error, IN_THE_WAY) else "make room if the disk is full"
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}; what was there before is intact, {remedy}"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace `path` atomically by `text`."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` atomically by `value` as JSON."""
    write_text(path, json.dumps(value, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Run:
    """An open run directory. Only rank 0 holds one; the OS releases its lock when the process ends, however it ends."""

    def __init__(self, path: Path, stage: str, config: Mapping[str, Any], lock: IO[str], attempt: int) -> None:
        self.path = path
        self.stage = stage
        self.config = config
        self.attempt = attempt
        self._lock = lock
        self._started = time.time()
        self._position = (0, 0)
        self._beaten = 0.0
        self._metrics = open(path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if _is_torn(path / "metrics.jsonl"):
            self._metrics.write("\n")

    @property
    def export_path(self) -> Path:
        """The hand-off file."""
        return self.path / "export" / "model.safetensors"

    def log(self, kind: str, step: int, **values: Any) -> None:
        """Append one row to metrics.jsonl; `step` counts optimiser steps since the start of the run."""
        row = {"kind": kind, "step": step, "attempt": self.attempt, **values}
        try:
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"{self.path / 'metrics.jsonl'}: cannot be written: {error.strerror}; make room") from error

    def heartbeat(self, step: int, total: int) -> None:
        """Note where the run is, in optimiser steps; status.json is rewritten at most every five seconds."""
        self._position = (step, total)
        if time.time() - self._beaten >= 5:
            self._beaten = time.time()
            self.status("running")

    def status(self, state: Literal["running", "done", "interrupted", "failed"], reason: str | None = None) -> None:
        """Replace status.json, with the position of the last heartbeat."""
        step, total = self._position
        write_json(
            self.path / "status.json",
            {
                "stage": self.stage,
                "state": state,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "job": os.environ.get("SLURM_JOB_ID"),
                "step": step,
                "total": total,
                "attempt": self.attempt,
                "reason": reason,
                "heartbeat": time.time(),
            },
        )

    def finish(self, metrics: Mapping[str, Any], upstream: Mapping[str, Any] | None, threads: int) -> None:
        """Write done.json, the last file of a run, and the final status."""
        exports = {file.name: file_sha256(file) for file in sorted(self.export_path.parent.glob("*.safetensors"))}
        write_json(
            self.path / "done.json",
            {
                "stage": self.stage,
                "export_sha256": exports[self.export_path.name],
                "exports": exports,
                "upstream": upstream,
                "metrics": metrics,
                "versions": _versions(),
                "git_commit": _git_commit(),
                "attempts": self.attempt,
                "threads": threads,
                "seconds": self._earlier_seconds() + time.time() - self._started,
            },
        )
        self.status("done")

    def _earlier_seconds(self) -> float:
        """Seconds that earlier attempts logged, up to the last row of each."""
        last: dict[int, float] = {}
        for row in _rows(self.path / "metrics.jsonl"):
            if row.get("attempt") != self.attempt and isinstance(row.get("seconds"), (int, float)):
                last[row["attempt"]] = row["seconds"]
        return sum(last.values())

    @property
    def seconds(self) -> float:
        """Seconds since this attempt began."""
        return time.time() - self._started

    def close(self) -> None:
        """Release the lock."""
        with contextlib.suppress(OSError):  # a full disk has been reported by `log`
            self._metrics.close()
        self._lock.close()


def open_run(path: Path, stage: str, config: Mapping[str, Any], resume: Literal["auto", "never", "must"]) -> Run:
    """Open or create the run directory `path` for this process.

    Raises UserError when another process holds it, when it was started with another configuration, when it is some
    other folder, and when `resume` does not fit what is there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir {path}: cannot be made: {error.strerror}; name another folder") from error
    others = [entry.name for entry in path.iterdir() if entry.name not in ("lock", "config.yaml")]
    if others and not (path / "config.yaml").exists() and not all(is_temporary(name) for name in others):
        raise UserError(
            f"{path}: not a run directory (it holds {sorted(others)[0]!r} but no config.yaml); name a new folder"
        )
    if resume == "must" and not list((path / "resume").glob("*.pt")):
        raise UserError(f"{path}: nothing to resume here and --resume is must; use --resume auto to start")
    lock = _acquire(path / "lock")
    for name in ("", "resume", "export"):
        for leftover in (path / name).glob(".*.tmp"):
            leftover.unlink()
    known = path / "config.yaml"
    if known.exists():
        if resume == "never":
            raise UserError(
                f"{path}: a run is already here and --resume is never; name a new folder, or use --resume auto"
            )
        changes = differences(read_config(path), config)
        if changes:
            shown = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changes[:5])
            raise UserError(
                f"{path}: the run here was started with another config ({shown}); name a new folder, or go back"
            )
    if not known.exists():
        write_text(known, f"# python -m {stage} --config THIS_FILE\n{yaml.safe_dump(dict(config), sort_keys=False)}")
    attempts = [row["attempt"] for row in _rows(path / "metrics.jsonl") if isinstance(row.get("attempt"), int)]
    run = Run(path, stage, config, lock, max(attempts, default=0) + 1)
    run.log("start", 0, host=socket.gethostname(), versions=_versions(), code=str(Path(__file__).resolve().parent))
    return run


@contextlib.contextmanager
def running(run: Run | None) -> Iterator[None]:
    """While a run works: what ends it early is noted in its status, and its lock is released. None: not rank 0."""
    try:
        yield
    except (CheckFailed, Interrupted, UserError) as reason:
        if run:
            with contextlib.suppress(UserError):  # a full disk, say, which `reason` tells
                run.status("interrupted" if isinstance(reason, Interrupted) else "failed", str(reason))
        raise
    finally:
        if run:
            run.close()


def is_finished(path: Path, config: Mapping[str, Any]) -> bool:
    """Whether `path` holds the finished run of this very configuration, its exports as they were written.

    A run that started from a file which is another one now is not: it was trained from something else.
    """
    exports = recorded_exports(path)
    if not exports or not (path / "config.yaml").exists() or differences(read_config(path), config):
        return False
    files = {path / "export" / name: sha256 for name, sha256 in exports.items()}
    upstream = json.loads((path / "done.json").read_text(encoding="utf-8")).get("upstream")
    for field, recorded in (("init_from", "sha256"), ("teacher_from", "teacher_sha256")):
        if config.get(field) and upstream and Path(config[field]).is_file():
            files[Path(config[field])] = upstream[recorded]
    return all(file.exists() and file_sha256(file) == sha256 for file, sha256 in files.items())


def recorded_exports(path: Path) -> dict[str, str] | None:
    """The sha256 of the hand-off files of a finished run by their names, model.safetensors always being one.

    None where the run directory `path` has no done.json, or a damaged one.
    """
    try:
        done = json.loads((path / "done.json").read_text(encoding="utf-8"))
        return {**done.get("exports", {}), "model.safetensors": done["export_sha256"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_config(path: Path) -> dict[str, Any]:
    """The config.yaml of a run directory. Raises UserError where it is absent or damaged."""
    file = path / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: cannot be read ({type(error).__name__}); give the run_dir of a stage") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not the configuration of a run; give the run_dir of a stage")
    return config


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in order of step: the last row of each (kind, step), a torn line left out."""
    last = {(row["kind"], row["step"]): row for row in _rows(path) if "kind" in row and "step" in row}
    return sorted(last.values(), key=lambda row: row["step"])


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _is_torn(path: Path) -> bool:
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a killed `write_atomic` left."""
    return name.startswith(".") and name.endswith(".tmp")


def _acquire(path: Path) -> IO[str]:
    """Lock `path` for the life of the process. A POSIX lock, which data workers forked from us do not inherit."""
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}; name another run_dir") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{path.parent}: in use by {holder}; wait for it, stop it, or name another run_dir") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Dotted fields of two configurations that differ and matter (UNCOMPARED do not): name, old, new."""
    if not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        return [(prefix, old, new)] if old != new else []
    found = []
    for name in [*old, *(name for name in new if name not in old)]:
        if prefix or name not in UNCOMPARED:
            found += differences(old.get(name), new.get(name), f"{prefix}.{name}" if prefix else name)
    return found


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _versions() -> dict[str, str]:
    names = ("poserelay", "torch", "torchvision", "timm", "lightly", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from, with `+` when it has local changes; None outside a checkout.

    Of a launcher's copy of the code, its SNAPSHOT.json tells; git would tell of a checkout that the copy lies in.
    """
    here = Path(__file__).resolve().parent
    snapshot = here.parent / "SNAPSHOT.json"
    if snapshot.exists():
        try:
            return json.loads(snapshot.read_text(encoding="utf-8"))["commit"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            ["git", "-C", here, "status", "--porcelain"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "") if commit.returncode == 0 else None
