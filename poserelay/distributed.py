"""One process per device: Fabric set-up from the launcher's environment, never starting processes of its own."""

from __future__ import annotations

import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import cv2
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch import nn

from .errors import CheckFailed, UserError

Result = TypeVar("Result")

RENDEZVOUS_SECONDS = 120
# One process validates while the others wait for it.
COLLECTIVE_TIMEOUT = timedelta(hours=1)
# What gloo, NCCL and the store say in a process whose peer is gone; their misuse and a full memory read otherwise.
LOST_PEER = re.compile(
    r"gloo/transport|Connection (closed|reset) by|connection was likely closed|remote process exited|ncclRemoteError"
    r"|Broken pipe",
    re.IGNORECASE,
)
PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def start(
    device: Literal["auto", "cpu", "cuda"], precision: str, threads: int, *, unused_parameters: bool = False
) -> Fabric:
    """Fabric for this process: alone, or one of WORLD_SIZE that the launcher started (design, Processes).

    `threads` is torch's number of CPU threads, 0 for its own choice. `unused_parameters`: some may have no gradient in
    a step, which several processes must look for. Raises UserError when a GPU is needed and missing,
    and when the other processes have not come within 120 s.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    if precision == "fp16" and not cuda:
        raise UserError("--precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    world = _variable("WORLD_SIZE", "1")
    # Fabric advises to start it with srun wherever it finds one; whoever starts us has decided that.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    if world == 1:
        # Without the explicit environment Fabric would read Slurm's variables and may start or expect more processes.
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=1,
            strategy=SingleDeviceStrategy(
                torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
            ),
            precision=PRECISIONS[precision],
            plugins=[LightningEnvironment()],
        )
    else:
        local_world = _variable("LOCAL_WORLD_SIZE")
        _join(world, cuda)
        fabric = Fabric(
            accelerator="cuda" if cuda else "cpu",
            devices=local_world,
            num_nodes=world // local_world,
            # DDP otherwise orders its sums anew after a start's first step, and from three processes on a resumed run
            # would differ in the last bits from one that was never interrupted; on GPUs speed comes before that.
            strategy=DDPStrategy(
                process_group_backend="nccl" if cuda else "gloo", find_unused_parameters=unused_parameters or not cuda
            ),
            precision=PRECISIONS[precision],
            plugins=[TorchElasticEnvironment()],
        )
        fabric.launch()
    cv2.setNumThreads(0)  # pictures are spread over workers, which OpenCV's own threads would only disturb
    if threads:
        torch.set_num_threads(threads)
    return fabric


def _variable(name: str, default: str = "") -> int:
    """A number that the launcher sets in the environment."""
    value = os.environ.get(name, default)
    if not value.isdecimal():
        raise UserError(
            f"environment variable {name} is {value!r}, expected a number; start several processes with a launcher "
            "that sets RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset WORLD_SIZE"
        )
    return int(value)


def _join(world: int, cuda: bool) -> None:
    """Join the process group ourselves: a short limit for the meeting, torch's longer one for the work after it."""
    host, port, rank, local_rank = os.environ.get("MASTER_ADDR"), *map(_variable, ("MASTER_PORT", "RANK", "LOCAL_RANK"))
    if not host:
        raise UserError("MASTER_ADDR is not set although WORLD_SIZE is above 1; start the processes with a launcher")
    if cuda:
        torch.cuda.set_device(local_rank)
    try:
        store = torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            host, port, world, is_master=rank == 0, timeout=timedelta(seconds=RENDEZVOUS_SECONDS)
        )
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} of {world}: no rendezvous at {host}:{port} within {RENDEZVOUS_SECONDS} s "
            f"({str(error).splitlines()[0]}); check that every process was started and reaches that host"
        ) from error


@contextmanager
def watching_peers(fabric: Fabric) -> Iterator[None]:
    """Around all that the processes of a run do together: CheckFailed where another of them has ended in between."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or not LOST_PEER.search(str(error)):
            raise
        # without the place in gloo's source before it, and the advice after it
        reason = re.sub(r"^\[\S*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
        raise CheckFailed(f"another process of this run ended: {reason}; see its output, then start again") from error


def sync_batch_norm(module: nn.Module, fabric: Fabric) -> nn.Module:
    """BatchNorm over all processes where there are several GPUs; on the CPU torch has it per process only."""
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return module


def on_rank_zero(fabric: Fabric, function: Callable[[], Result]) -> Result | None:
    """`function()` on rank 0, None elsewhere; its UserError or CheckFailed is raised on every rank: none waits."""
    result, problem = None, None
    if fabric.is_global_zero:
        try:
            result = function()
        except (UserError, CheckFailed) as error:
            problem = UserError(str(error)) if isinstance(error, UserError) else error
    with watching_peers(fabric):
        problem = fabric.broadcast(problem)
    if problem is not None:
        raise problem
    return result


class StopSignals:
    """Within its `with` block, remembers SIGTERM, SIGINT and SIGUSR2 (submitit's) until the loop asks."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: Any) -> None:
        if self.received and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step to end
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self, fabric: Fabric) -> str | None:
        """Name of the signal that any process received; every process must ask at the same step."""
        if fabric.world_size == 1:
            return self.received
        flag = torch.tensor(0.0 if self.received is None else 1.0, device=fabric.device)
        total = fabric.all_reduce(flag, reduce_op="sum")
        return (self.received or "a signal to another process") if float(total) > 0 else None  # pyright: ignore[reportArgumentType]
