"""SimSiam's linear probe, top to bottom: class folders -> frozen features -> one linear layer -> top-1.

The protocol of Chen and He (SimSiam, 2021, appendix A) and its published code: the backbone in eval mode, so that not
even its batch-norm statistics move; its deepest map averaged; a linear layer trained on random crops by LARS.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightly.utils.lars import LARS
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from poserelay.backbones.features import LEVELS
from poserelay.checkpoint import (
    describe,
    load_resume,
    read_export,
    restore_training,
    save_resume,
    training_state,
    upstream_of,
    write_export,
)
from poserelay.command import to_plain
from poserelay.datasets.sampling import EpochBatches, steps_per_epoch, training_loader
from poserelay.datasets.unlabelled import collate_views
from poserelay.distributed import StopSignals, on_rank_zero, start, watching_peers
from poserelay.embeddings import load_backbone
from poserelay.errors import Interrupted, UnreadableImage, UserError
from poserelay.model import normalise
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount, check_weights
from poserelay.run import Run, is_finished, open_run, running
from poserelay.schedules import cosine

from .class_folders import ClassFolders, each_once, load_class_folders
from .linear_config import LinearConfig, LinearOptimConfig

# lightly's LARS does not scale a parameter whose weight decay is 0; that of SimSiam's code (apex's LARC) does.
NO_DECAY = 1e-30


class Features(nn.Module):
    """A frozen backbone and the average of its deepest map.

    Args:
        path: hand-off file with the backbone.
        size: side of the crops, pixels.

    Raises:
        UserError: not a hand-off file, or a size that the backbone cannot divide.
    """

    def __init__(self, path: str, size: int) -> None:
        super().__init__()
        self.backbone, trained = load_backbone(path)
        self.input = replace(trained, height=size, width=size)
        self.described = read_export(path)[1]
        self.requires_grad_(False).eval()
        name, coarsest = self.described["backbone"]["name"], max(self.backbone.strides)
        if len(self.backbone.strides) < LEVELS:
            raise UserError(
                f"{path}: a pose model keeps only a part of {name}; give the file that it was fine-tuned from"
            )
        if size % coarsest:
            raise UserError(f"size is {size}; give a multiple of {coarsest}, the stride of {name}")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Turn uint8 RGB `[B, 3, size, size]` into features `[B, C]`."""
        return self.backbone(normalise(images, self.input))[-1].mean((-2, -1))


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    classes: list[str]
    step: int = 0
    unreadable: int = 0
    validation: dict[str, float] = field(default_factory=dict)


def main(config: LinearConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    upstream = upstream_of(config.init_from)
    data = load_class_folders(config.data, config.size)
    features = Features(config.init_from, config.size)
    fabric = start(config.device, config.precision, config.threads)
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "pretrain linear", plain, config.resume))
    with running(run), watching_peers(fabric):
        train(fabric, features, data, config, run, upstream)


def train(
    fabric: Fabric,
    features: Features,
    data: ClassFolders,
    config: LinearConfig,
    run: Run | None,
    upstream: dict[str, Any],
) -> None:
    """Set up the classifier and its optimiser, resume, run all steps, export."""
    folder, world = Path(config.run_dir) / "resume", fabric.world_size
    global_batch = config.optim.batch_size * world
    per_epoch = steps_per_epoch(len(data.training), global_batch)
    total = per_epoch * config.optim.epochs
    base_lr = config.optim.base_lr * global_batch / 256
    features.to(fabric.device)
    classifier = build_classifier(features.backbone.channels[-1], len(data.classes), config.seed)
    network = fabric.setup_module(classifier)
    plain_optimizer = build_optimizer(classifier, config.optim, base_lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    saved = load_resume(folder)
    check_classes(saved, data.classes)
    state = State(world, len(data.training), data.classes)
    state = restore_training(saved, classifier, plain_optimizer, fabric, upstream, state)
    announce(fabric, config, data, global_batch, base_lr, total, state)

    batches = EpochBatches(
        len(data.training), config.optim.batch_size, total, rank=fabric.global_rank, world=world, start_step=state.step
    )
    cuda = fabric.device.type == "cuda"
    loader = training_loader(
        data.training, collate_views, batches, seed=config.seed, workers=config.workers, pin_memory=cuda
    )
    progress = Progress(loader, state.step, total, global_batch, "pretrain linear", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    losses = LossWindow()
    unreadable = UnreadableCount(config.max_unreadable, per_epoch * global_batch, state.unreadable)
    with StopSignals() as signals:
        for views in progress:
            epoch = state.step // per_epoch
            lr = cosine(base_lr, epoch, config.optim.epochs)
            for group in plain_optimizer.param_groups:
                group["lr"] = lr
            labels = data.labels(views.names).to(fabric.device)
            values = training_step(fabric, features, network, optimizer, views.images[0], labels)
            state.step += 1
            losses.add(state.step, values, views.names)
            unreadable.add(views.replaced)

            ends, epoch_ends = state.step == total, state.step % per_epoch == 0
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                loss, top1 = losses.flush(fabric)
                named = {"loss": loss, "top1": top1, "unreadable": unreadable.check(fabric), "lr": lr}
                if journal:
                    journal.write("train", state.step, epoch, {**named, **progress.rates()})
            if epoch_ends:
                unreadable.new_epoch()
                if ends or (epoch + 1) % config.validate_every == 0:
                    state.validation = validate(fabric, features, network, data, config)
                    if journal:
                        journal.write("validation", state.step, epoch, state.validation)
            if stop or saves:
                check_weights(classifier, state.step, views.names)
            if run and (stop or saves):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(classifier, plain_optimizer, fabric, upstream, state))
            if stop:
                raise Interrupted(
                    f"{stop} at step {state.step} of {total}; saved, start the same command again to go on"
                )
    if run and journal:
        journal.close()
        run.heartbeat(state.step, total)
        export(run, features, classifier, data, config, state, upstream)
    fabric.barrier()


def build_classifier(channels: int, classes: int, seed: int) -> nn.Linear:
    """The linear layer, weights from N(0, 0.01) and biases 0."""
    classifier = nn.Linear(channels, classes)
    nn.init.normal_(classifier.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(classifier.bias)
    return classifier


def build_optimizer(classifier: nn.Linear, optim: LinearOptimConfig, lr: float) -> torch.optim.Optimizer:
    """LARS with trust coefficient 0.001, or SGD."""
    if optim.optimizer == "sgd":
        return torch.optim.SGD(classifier.parameters(), lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    decay = optim.weight_decay or NO_DECAY
    return LARS(classifier.parameters(), lr, momentum=optim.momentum, weight_decay=decay, trust_coefficient=0.001)


def check_classes(saved: dict[str, Any] | None, classes: list[str]) -> None:
    """Raise UserError where the classes of a resumed run are no longer those it was started with."""
    before = saved["state"]["classes"] if saved else classes
    if before != classes:
        changed = sorted({*before} ^ {*classes})
        raise UserError(
            f"resume: this run was started on {len(before)} classes and now finds {len(classes)} ({changed[0]!r} is "
            "only in one of the two); put the folders back as they were, or name a new run_dir"
        )


def training_step(
    fabric: Fabric, features: Features, network: Any, optimizer: Any, images: Tensor, labels: Tensor
) -> Tensor:
    """One optimiser step on uint8 crops `[B, 3, size, size]` with labels `[B]`; returns loss and top-1, `[2]`."""
    logits = classify(fabric, features, network, images)
    loss = cross_entropy(logits, labels)
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])


def classify(fabric: Fabric, features: Features, network: Any, images: Tensor) -> Tensor:
    """Logits `[B, classes]`, float32, of uint8 crops `[B, 3, size, size]`."""
    with fabric.autocast():
        pooled = features(images.to(fabric.device, non_blocking=True))
    return network(pooled).float()


@torch.no_grad()
def validate(
    fabric: Fabric, features: Features, network: Any, data: ClassFolders, config: LinearConfig
) -> dict[str, float]:
    """Share of the validation pictures whose class is the first guess, and among the first five of more classes.

    Every process must call it. Raises UserError, on every process, naming a picture that cannot be read.
    """
    hits = torch.zeros(4, device=fabric.device)  # top-1, top-5, pictures, processes that met an unreadable one
    rank, world = fabric.global_rank, fabric.world_size
    problem = "a validation picture cannot be read; another process names it"
    try:
        for views in each_once(data.validation, config.optim.batch_size, config.workers, rank=rank, world=world):
            labels = data.labels(views.names).to(fabric.device)
            guesses = classify(fabric, features, network, views.images[0]).topk(min(5, len(data.classes))).indices
            right = guesses == labels[:, None]  # [B, 5]
            hits[:3] += torch.stack([right[:, 0].sum(), right.any(1).sum(), torch.ones_like(labels).sum()])
    except UnreadableImage as error:
        problem = str(error)
        hits[3] = 1
    top1, top5, pictures, unreadable = fabric.all_reduce(hits, reduce_op="sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
    if unreadable:
        raise UserError(problem)
    return {"top1": top1 / pictures} | ({"top5": top5 / pictures} if len(data.classes) > 5 else {})


def export(
    run: Run,
    features: Features,
    classifier: nn.Linear,
    data: ClassFolders,
    config: LinearConfig,
    state: State,
    upstream: dict[str, Any],
) -> None:
    """Write the hand-off file, the backbone as it came and the classifier, and the record of the run."""
    protocol = {
        "split": Path(config.data.validation).name,
        "pictures": len(data.validation),
        "classes": len(data.classes),
        "crop": f"central {config.size} pixels, shorter side {round(config.size * 8 / 7)}",
        "optimizer": config.optim.optimizer,
        "epochs": config.optim.epochs,
    }
    metrics = {**state.validation, "protocol": protocol}
    head = {"name": "linear", "kwargs": {"classes": data.classes}}
    described = describe(
        stage="linear",
        method=features.described["method"],
        model={"backbone": features.described["backbone"], "head": head, "input": to_plain(features.input)},
        skeleton=None,
        config=to_plain(config),
        upstream=upstream,
        metrics=metrics,
    )
    weights = {f"backbone.{name}": value for name, value in features.backbone.state_dict().items()}
    weights |= {f"head.{name}": value for name, value in classifier.state_dict().items()}
    write_export(run.export_path, weights, described)
    run.finish(metrics, upstream, torch.get_num_threads())


def announce(
    fabric: Fabric,
    config: LinearConfig,
    data: ClassFolders,
    global_batch: int,
    base_lr: float,
    total: int,
    state: State,
) -> None:
    """Say on stderr what is about to run."""
    lines = [
        f"pretrain linear: {len(data.training)} pictures of {len(data.classes)} classes, {len(data.validation)} to "
        f"validate on, {total} steps, {fabric.device.type} {config.precision}, {torch.get_num_threads()} threads; "
        f"batch {global_batch} in all ({config.optim.batch_size} x {fabric.world_size}); {config.optim.optimizer}, "
        f"lr {base_lr:g} = {config.optim.base_lr:g} x {global_batch} / 256"
    ]
    if len(data.training) < global_batch:
        lines.append(
            f"warning: a batch of {global_batch} repeats the {len(data.training)} pictures; lower optim.batch_size"
        )
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
