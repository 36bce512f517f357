"""One process of a job: its environment, its start, the signals passed on to it. Imports neither torch nor a stage."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1


def contract(
    *, rank: int, world: int, local_rank: int, local_world: int, node: int, address: str, port: int
) -> dict[str, str]:
    """torchrun's variables, which every stage reads (design, Processes); `address` is that of rank 0's node."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def start(
    arguments: Sequence[str], code: Path, environment: Mapping[str, str], cpus: int, log: Path, *, session: bool
) -> subprocess.Popen[bytes]:
    """`python -m ARGUMENTS` on the code in `code`, output added to `log`.

    `session` gives it a process group of its own, which a terminal's Ctrl-C does not reach. If this process is killed,
    the started one gets SIGTERM, and saves.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        **os.environ,
        # As many threads on every kind of cluster: results on the CPU depend on their number.
        "OMP_NUM_THREADS": str(cpus),
        **environment,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
    }
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=code,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=session,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
