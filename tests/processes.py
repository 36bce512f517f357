"""Runs of a stage in forked processes: torch is imported once, so that a test can start and kill many."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

Main = Callable[[list[str]], int]


def start(main: Main, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> int:
    """Fork a process group that runs `main(arguments)` with its output in `log`; returns its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(process, process)
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = open(handle, "w", buffering=1)  # noqa: SIM115 - pytest's own hold other files
        os.environ.update(environment or {})
        # Processes share tqdm's own lock through a fork: one killed while it holds it would stop all that follow.
        tqdm.set_lock(threading.RLock())
        code = main(list(arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(process: int, seconds: float = 120) -> int:
    """Wait for a process and return its exit code, negative for a signal; it is killed after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    kill(process)
    raise AssertionError(f"process {process} did not end within {seconds} s")


def kill(process: int) -> None:
    """kill -9 of the whole process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(world: int) -> list[dict[str, str]]:
    """The environment that the launcher gives each of `world` processes on one machine."""
    port = str(free_port())
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world)
    ]
