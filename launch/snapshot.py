"""The code that jobs run: a copy of the packages as they are at submission. Imports no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from poserelay.errors import UserError
from poserelay.run import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("poserelay", "pretrain", "semi", "finetune", "evaluation", "launch")


def take_snapshot(folder: Path) -> str | None:
    """Copy the packages of this checkout to `folder`, with SNAPSHOT.json and local.diff; returns the commit.

    The commit has a `+` where the checkout differs from it, and local.diff then says how; None outside a checkout.
    """
    commit, diff = git_state()
    try:
        for name in PACKAGES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        write_json(folder / "SNAPSHOT.json", {"commit": commit})
        if diff:
            write_text(folder / "local.diff", diff)
    except OSError as error:  # shutil.Error, one too, lists every file that failed
        first = error.args[0][0] if isinstance(error, shutil.Error) else (folder, None, error.strerror)
        raise UserError(
            f"{first[0]}: cannot be copied into {folder}: {first[2]}; make room, or name another run_dir"
        ) from error
    return commit


def in_snapshot(path: Path, code: Path) -> Path:
    """Where a file of this checkout's packages lies in the snapshot `code`; other paths as they are."""
    for name in PACKAGES:
        if path.is_relative_to(ROOT / name) and path.is_file():
            return code / path.relative_to(ROOT)
    return path


def git_state() -> tuple[str | None, str]:
    """Commit of this checkout, with `+` where it has changes, and the changes; None outside a checkout."""

    def git(*arguments: str) -> str | None:
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        try:
            done = subprocess.run(
                ["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=60, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None, ""
    present = [name for name in PACKAGES if (ROOT / name).is_dir()]
    diff = git("diff", "HEAD", "--", *present) or ""
    new = (git("ls-files", "-z", "--others", "--exclude-standard", "--", *present) or "").split("\0")
    diff += "".join(f"new file, in the snapshot: {name}\n" for name in new if name)
    return commit.strip() + ("+" if diff else ""), diff
