"""Persons of several sources in one epoch, and what changes from phase to phase (CCM section 4, Eq. 10)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poserelay.datasets.sampling import Draws, draw_generator, epoch_order, steps_per_epoch
from poserelay.datasets.topdown import CropRecord, TopDownDataset
from poserelay.schedules import drops

from .config import FinetuneConfig

CHOICE_VIEW = 2**64 - 4
"""The view number whose draws choose the persons of a source, beside those in `datasets.sampling`."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps on the same sources."""

    letters: str
    drawn: tuple[int, ...]
    """Persons of each source in an epoch, in the mixture's order of sources."""
    first_step: int
    steps: int
    first_epoch: int
    per_epoch: int
    """Steps."""
    base_lr: float
    drops: tuple[int, ...]
    """Epochs of the phase after which the rate falls; steps where `drops_by_step`."""
    drops_by_step: bool

    @property
    def end(self) -> int:
        """The step after the phase's last."""
        return self.first_step + self.steps

    def epoch(self, step: int) -> int:
        """The epoch of a step of the run, both counted from the run's start."""
        return self.first_epoch + (step - self.first_step) // self.per_epoch

    def epoch_ends(self, step: int) -> bool:
        """Whether the epoch is over after `step` steps of the run."""
        return (step - self.first_step) % self.per_epoch == 0

    def lr(self, step: int) -> float:
        """The learning rate of a step of the run."""
        reached = step - self.first_step if self.drops_by_step else self.epoch(step) - self.first_epoch
        return drops(self.base_lr, reached, self.drops)


class Mixture:
    """The crops of several sources; which ones an epoch visits, and in which order, is its phase's.

    Where more of a source are drawn than it has, each comes as often as it must, augmented anew every time.

    Args:
        sources: each with its own augmentation; the indices of the mixture count through them.
        phases: in their order, from epoch 0 on.
    """

    def __init__(self, sources: Sequence[TopDownDataset], phases: Sequence[Phase]) -> None:
        self.sources = sources
        self.phases = phases
        self._offsets = np.cumsum([0, *map(len, sources)])
        self._remembered: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """What the epoch visits: indices into the mixture, those of a later repetition raised by its length."""
        if self._remembered is None or self._remembered[0] != (seed, epoch):
            self._remembered = (seed, epoch), self._drawn(seed, epoch)
        return self._remembered[1]

    def sample(self, index: int, generator: Draws) -> CropRecord:
        """The augmented crop at an index of `order`; raises UnreadableImage."""
        place = index % len(self)
        source = int(np.searchsorted(self._offsets, place, side="right")) - 1
        return self.sources[source].sample(place - int(self._offsets[source]), generator)

    def _drawn(self, seed: int, epoch: int) -> np.ndarray:
        phase = next(phase for phase in reversed(self.phases) if phase.first_epoch <= epoch)
        chosen = []
        for number, (source, count) in enumerate(zip(self.sources, phase.drawn, strict=True)):
            if not count:
                continue
            repeats, rest = divmod(count, len(source))
            some = draw_generator(seed, epoch, number, CHOICE_VIEW).permutation(len(source))[:rest]
            rounds = [np.arange(len(source))] * repeats + [np.sort(some)]
            chosen += [own + self._offsets[number] + turn * len(self) for turn, own in enumerate(rounds)]
        together = np.concatenate(chosen)
        return together[epoch_order(seed, epoch, len(together))]


def plan_phases(
    config: FinetuneConfig, sources: Mapping[str, int], labelled: int, global_batch: int
) -> tuple[Phase, ...]:
    """The one or two phases of a run.

    Args:
        sources: persons of each letter, in the mixture's order.
        labelled: persons of `data`, which the ratios refer to.
        global_batch: persons per step, over all processes.
    """
    ratios = {
        "A": config.external.ratio,
        "H": config.hard_negatives.ratio,
        "U": config.pseudo_labelled.ratio,
    }
    asked = dict(sources)
    for letter, ratio in ratios.items():
        if letter in asked and ratio is not None:
            asked[letter] = max(1, round(ratio * labelled))
    first, then = config.optim, config.then
    wanted = [(config.train_on, first.epochs, first.steps, first.lr, first.drops)]
    if config.has_second_phase:
        wanted.append((then.train_on or config.train_on, then.epochs, then.steps, then.lr, then.drops))
    phases: list[Phase] = []
    for train_on, epochs, steps, lr, lr_drops in wanted:
        letters = config.sources_of(train_on)
        drawn = tuple(count if letter in letters else 0 for letter, count in asked.items())
        per_epoch = steps_per_epoch(sum(drawn), global_batch)
        before = phases[-1] if phases else None
        phases.append(
            Phase(
                letters=letters,
                drawn=drawn,
                first_step=before.end if before else 0,
                steps=steps or epochs * per_epoch,
                first_epoch=before.epoch(before.end - 1) + 1 if before else 0,
                per_epoch=per_epoch,
                base_lr=lr,
                drops=lr_drops,
                drops_by_step=steps is not None,
            )
        )
    return tuple(phases)
