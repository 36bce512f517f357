"""What a training loop watches: throughput, waiting for data, losses that stop being numbers, unreadable pictures."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .errors import CheckFailed
from .run import Run

Batch = TypeVar("Batch")


class Progress(Generic[Batch]):
    """Iterates over batches and measures, between two calls of `rates`, throughput and waiting.

    `images_per_step` counts the images of one optimiser step over all processes.
    """

    def __init__(
        self, batches: Iterable[Batch], start: int, total: int, images_per_step: int, title: str, shown: bool
    ) -> None:
        self._batches = batches
        self._images = images_per_step
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(initial=start, total=total, desc=title, unit="step", disable=not terminal, leave=False)
        self._since, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                self._bar.close()
                return
            self._waited += time.perf_counter() - asked
            self._steps += 1
            yield batch
            self._bar.update()

    def rates(self) -> dict[str, float]:
        """`images_per_second` over all processes and `data_wait` (share of the time, 0..1) since the last call."""
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rates = {"images_per_second": self._steps * self._images / seconds, "data_wait": self._waited / seconds}
        self._since, self._steps, self._waited = now, 0, 0.0
        return rates

    def show(self, text: str) -> None:
        """One line of news: beside the bar on a terminal, on stderr in a job's log."""
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            self._bar.set_postfix_str(text)


class Journal:
    """Where rank 0 reports: metrics.jsonl, TensorBoard, and the terminal."""

    def __init__(self, run: Run, progress: Progress[Any], start: int, total: int) -> None:
        self._run = run
        self._progress = progress
        self._total = total
        # A resumed run draws over what an earlier attempt logged beyond its resume file.
        self._board = SummaryWriter(str(run.path / "tensorboard"), purge_step=start)

    def write(self, kind: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Report named values at an optimiser step; `epoch` counts from 0."""
        self._run.log(kind, step, epoch=epoch, seconds=round(self._run.seconds, 3), **values)
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._progress.show(f"{kind} epoch {epoch + 1} step {step}/{self._total}  {shown}")
        self._run.heartbeat(step, self._total)

    def close(self) -> None:
        """Flush TensorBoard."""
        self._board.close()


class LossWindow:
    """Losses since the last `flush`, left on the device so that a step does not wait for the GPU."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._sources: deque[tuple[int, Sequence[object]]] = deque()

    def add(self, step: int, losses: Tensor, sources: Sequence[object]) -> None:
        """Remember a step's losses `[L]` (detached here) and the pictures it used."""
        self._losses.append(losses.detach().reshape(-1))
        self._sources.append((step, sources))

    def flush(self, fabric: Fabric) -> list[float]:
        """Mean of each of the L losses over the window and all processes; every process must call it.

        Raises CheckFailed, on every process, naming the first step and its pictures where a loss is NaN or infinite.
        """
        values = torch.stack(self._losses)  # [steps, L]
        means: Tensor = fabric.all_reduce(values.mean(0), reduce_op="mean")  # pyright: ignore[reportAssignmentType]
        result = means.tolist()
        if not all(math.isfinite(value) for value in result):
            bad = (~torch.isfinite(values).all(1)).nonzero().flatten().tolist()
            step, sources = self._sources[bad[0]] if bad else (self._sources[0][0], ["in another process"])
            raise CheckFailed(
                f"the loss is not a number at step {step} (pictures: {_shown(sources)}); the last resume file is from "
                "before it. Lower the learning rate, or train in bf16 or fp32 if this was fp16"
            )
        self._losses.clear()
        self._sources.clear()
        return result


def check_weights(module: nn.Module, step: int, sources: Sequence[object]) -> None:
    """Raise CheckFailed where a step has left a weight that is not finite: such a state is neither saved nor exported.

    Processes that train one model have the same weights and find the same.
    """
    values = [*module.parameters(), *module.buffers()]
    if not bool(torch.stack([value.isfinite().all() for value in values]).all()):
        raise CheckFailed(
            f"weights are not numbers after step {step} (pictures: {_shown(sources)}); the last resume file is from "
            "before it. Lower the learning rate, or train in bf16 or fp32 if this was fp16"
        )


def _shown(sources: Sequence[object]) -> str:
    return ", ".join(map(str, sources[:8])) + (" ..." if len(sources) > 8 else "")


class UnreadableCount:
    """Counts the pictures of the current epoch that cannot be read, each once; stops above a share of the epoch."""

    def __init__(self, share: float, epoch_images: int, count: int = 0) -> None:
        self.count = count
        self.epoch_images = epoch_images
        """Pictures of the current epoch, over all processes."""
        self._share = share
        self._since_check: list[str] = []
        self._seen: set[str] = set()

    def add(self, replaced: Sequence[str]) -> None:
        """Remember the messages of the pictures that a batch could not read."""
        self._since_check += [message for message in dict.fromkeys(replaced) if message not in self._seen]
        self._seen.update(replaced)

    def new_epoch(self) -> None:
        """Begin to count anew."""
        self.count = 0
        self._seen.clear()

    def check(self, fabric: Fabric) -> int:
        """Unreadable pictures of this epoch over all processes; every process must call it. Raises CheckFailed."""
        new = torch.tensor(float(len(self._since_check)), device=fabric.device)
        self.count += int(fabric.all_reduce(new, reduce_op="sum"))  # pyright: ignore[reportArgumentType]
        for message in self._since_check:
            print(f"warning: {message}; the next picture took its place", file=sys.stderr)
        if self.count > self._share * self.epoch_images:
            raise CheckFailed(
                f"{self.count} of the epoch's {self.epoch_images} pictures are unreadable (named above); "
                f"repair them, or raise max_unreadable ({self._share})"
            )
        self._since_check.clear()
        return self.count
