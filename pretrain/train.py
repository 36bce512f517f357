"""Self-supervised pretraining, top to bottom: pictures -> two views -> siamese network -> loss -> run directory."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightly.utils.lars import LARS
from lightning_fabric import Fabric
from torch import Tensor

from poserelay.backbones import Backbone
from poserelay.checkpoint import describe, load_resume, restore_training, save_resume, training_state, write_export
from poserelay.command import to_plain
from poserelay.datasets.sampling import EpochBatches, step_generator, steps_per_epoch, training_loader
from poserelay.datasets.shards import find_pictures
from poserelay.datasets.unlabelled import (
    FilePictures,
    JoinedPictures,
    Pictures,
    UnlabelledImages,
    coco_images,
    collate_views,
)
from poserelay.distributed import StopSignals, on_rank_zero, start, sync_batch_norm, watching_peers
from poserelay.errors import CheckFailed, Interrupted, UserError
from poserelay.model import build_backbone, check_kwargs, normalise
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount, check_weights
from poserelay.run import Run, is_finished, open_run, running
from poserelay.schedules import cosine

from .comparison import Comparison, Method
from .config import OptimConfig, PretrainConfig
from .densecl import DenseCL
from .device_views import DeviceColour
from .knn import OnlineKnn, load_online_knn
from .moco import MoCo
from .monitors import MIN_RANK, collapse_warnings, effective_rank, spread
from .mscl import MSCL
from .simsiam import SimSiam
from .views import TwoViews

METHODS: dict[str, Callable[..., Any]] = {"mscl": MSCL, "simsiam": SimSiam, "moco": MoCo, "densecl": DenseCL}

# rows of metrics.jsonl in a row that look collapsed before on_collapse: stop ends a run
COLLAPSED_ROWS = 5


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    step: int = 0
    unreadable: int = 0
    collapsed: int = 0
    """Rows running in which some term looked collapsed."""


def main(config: PretrainConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    images = load_data(config) if config.optim.epochs else None
    knn = load_online_knn(config.knn) if config.knn and config.optim.epochs else None
    fabric = start(config.device, config.precision, config.threads)
    torch.manual_seed(config.seed)
    backbone = build_backbone(config.model.backbone)
    method = build_method(config, backbone) if images else None
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "pretrain", plain, config.resume))
    with running(run), watching_peers(fabric):
        if images and method:
            train(fabric, method, images, knn, config, run)
        if run:
            export(run, backbone, config)
        fabric.barrier()


def load_data(config: PretrainConfig) -> UnlabelledImages:
    """List the pictures; `config.data.images` is given."""
    folder = str(config.data.images)
    if config.data.annotations:
        first: Pictures = FilePictures(coco_images(config.data.annotations, folder))
    else:
        first = find_pictures(folder)
    parts = [first, *(find_pictures(further) for further in config.data.more_images)]
    pictures = JoinedPictures(parts) if len(parts) > 1 else first
    if len(pictures) < 2:
        raise UserError(f"{folder}: one picture; pretraining compares pictures, give at least two")
    return UnlabelledImages(pictures, TwoViews(config.model.input.height, colour=config.views.colour))


def build_method(config: PretrainConfig, backbone: Backbone) -> Method:
    """What is trained around the backbone that will be handed off."""
    named = config.method
    if named.name not in METHODS:
        raise UserError(f"method {named.name!r} is not known; choose from {', '.join(METHODS)}, none")
    check_kwargs("method", named, METHODS[named.name], given=("backbone", "channels"))
    return METHODS[named.name](backbone, backbone.channels, **named.kwargs)


def train(
    fabric: Fabric,
    method: Any,
    images: UnlabelledImages,
    knn: OnlineKnn | None,
    config: PretrainConfig,
    run: Run | None,
) -> None:
    """Set up the optimiser, resume, run all steps."""
    folder, world = Path(config.run_dir) / "resume", fabric.world_size
    global_batch = config.optim.batch_size * world
    per_epoch = steps_per_epoch(len(images), global_batch)
    total = per_epoch * config.optim.epochs
    base_lr = config.optim.base_lr * global_batch / 256
    network = wrap(fabric, method, config)
    plain_optimizer = build_optimizer(method, config.optim, base_lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    state = restore_training(load_resume(folder), method, plain_optimizer, fabric, None, State(world, len(images)))
    announce(fabric, method, config, images, base_lr, total, state)
    if config.on_collapse == "stop" and state.collapsed >= COLLAPSED_ROWS:
        raise CheckFailed(
            f"this run has collapsed by step {state.step}; lower optim.base_lr in a new run_dir, or go on with "
            "--on_collapse warn"
        )

    batches = EpochBatches(
        len(images), config.optim.batch_size, total, rank=fabric.global_rank, world=world, start_step=state.step
    )
    cuda = fabric.device.type == "cuda"
    loader = training_loader(images, collate_views, batches, seed=config.seed, workers=config.workers, pin_memory=cuda)
    progress = Progress(loader, state.step, total, global_batch, "pretrain", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    colour = DeviceColour(TwoViews(config.model.input.height)) if config.views.colour == "device" else None
    losses, collapsed = LossWindow(), None
    unreadable = UnreadableCount(config.max_unreadable, per_epoch * global_batch, state.unreadable)
    with StopSignals() as signals:
        for views in progress:
            epoch = state.step // per_epoch
            lr = cosine(base_lr, epoch, config.optim.epochs)
            for group in plain_optimizer.param_groups:
                group["lr"] = base_lr if group["fixed"] else lr
            batch = views.images.to(fabric.device, non_blocking=True)
            if colour:
                batch = colour(batch, step_generator(config.seed, state.step, fabric.global_rank))
            values = training_step(fabric, network, method, optimizer, batch, config)
            state.step += 1
            losses.add(state.step, values, views.names)
            unreadable.add(views.replaced)

            ends, epoch_ends = state.step == total, state.step % per_epoch == 0
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                named = name_values(method, losses.flush(fabric))
                collapsed = watch(fabric, method, named, state, total, config.optim)
                rates = {f"lr{'_fixed' * group['fixed']}": group["lr"] for group in plain_optimizer.param_groups}
                named |= {"unreadable": unreadable.check(fabric), **rates, **progress.rates(), **memory(fabric)}
                if journal:
                    journal.write("train", state.step, epoch, named)
                stop = stop or (collapsed if config.on_collapse == "stop" else None)
            if epoch_ends:
                unreadable.new_epoch()
            if stop or saves:
                check_weights(method, state.step, views.names)
            if run and (stop or saves):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(method, plain_optimizer, fabric, None, state))
            if knn and epoch_ends and (ends or (epoch + 1) % knn.config.every == 0):
                evaluate = partial(knn.evaluate, method.backbone, config.model.input, workers=config.workers)
                accuracy = on_rank_zero(fabric, evaluate)
                if journal and accuracy:
                    journal.write("knn", state.step, epoch, accuracy)
            if stop and stop == collapsed:
                raise CheckFailed(stop)
            if stop:
                raise Interrupted(
                    f"{stop} at step {state.step} of {total}; saved, start the same command again to go on"
                )
    if run and journal:
        journal.close()
        run.heartbeat(state.step, total)


def wrap(fabric: Fabric, method: Any, config: PretrainConfig) -> Any:
    """The networks as the loop calls them: batch norm over all GPUs where wanted, compiled, one process of several."""
    if fabric.world_size > 1:
        freeze_unreached(method, config)
        if method.sync_batch_norm:
            sync_batch_norm(method, fabric)
    if fabric.device.type == "cuda":
        method.to(memory_format=torch.channels_last)
    network: Any = torch.compile(method) if config.compile else method
    return fabric.setup_module(network)


def freeze_unreached(method: Any, config: PretrainConfig) -> None:
    """Freeze what no gradient reaches, an HRNet's other branches under SimSiam: several processes would wait for it."""
    probe = copy.deepcopy(method).eval()
    size = (2, 3, config.model.input.height, config.model.input.width)
    probe.compare(probe(torch.zeros(size), torch.zeros(size))).loss.backward()
    for parameter, probed in zip(method.parameters(), probe.parameters(), strict=True):
        parameter.requires_grad_(probed.grad is not None)


def training_step(
    fabric: Fabric, network: Any, method: Any, optimizer: Any, views: Tensor, config: PretrainConfig
) -> Tensor:
    """One optimiser step on uint8 views `[2, B, 3, H, W]`; returns `[1 + 3 L]`: loss; loss, spread, rank per term."""
    rows = []
    parts = views.chunk(config.optim.micro_batches, dim=1)
    optimizer.zero_grad()
    for number, part in enumerate(parts):
        unfinished = fabric.world_size > 1 and number < len(parts) - 1
        with fabric.no_backward_sync(network, enabled=unfinished):
            comparison = method.compare(network(*(normalise(view, config.model.input) for view in part)))
            fabric.backward(comparison.loss / len(parts))
        rows.append(figures(comparison))
    optimizer.step()
    method.after_step()
    return torch.stack(rows).mean(0)


def figures(comparison: Comparison) -> Tensor:
    """What the loop watches, `[1 + 3 L]`."""
    spreads = torch.stack([spread(output) for output in comparison.outputs])
    ranks = torch.stack([effective_rank(output) for output in comparison.outputs])
    return torch.cat([comparison.loss.detach()[None], comparison.terms.detach(), spreads, ranks])


def build_optimizer(method: Any, optim: OptimConfig, base_lr: float) -> torch.optim.Optimizer:
    """SGD or LARS, with the prediction heads in groups of their own, whose learning rate may stay fixed."""
    heads = {id(parameter) for parameter in method.predictors()}
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    parts = [[p for p in trained if (id(p) in heads) == part] for part in (False, True)]
    groups = [
        {"params": part, "fixed": fixed}
        for part, fixed in zip(parts, (False, optim.fixed_predictor_lr), strict=True)
        if part
    ]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, base_lr, momentum=optim.momentum, weight_decay=optim.weight_decay)
    # lightly's LARS scales no group without weight decay, as SimCLR and BYOL ask for biases and norms
    split = [
        {"params": chosen, "fixed": group["fixed"], "weight_decay": optim.weight_decay if matrices else 0.0}
        for group in groups
        for matrices in (True, False)
        if (chosen := [p for p in group["params"] if (p.ndim > 1) == matrices])
    ]
    return LARS(split, base_lr, momentum=optim.momentum, weight_decay=optim.weight_decay)


def name_values(method: Any, values: list[float]) -> dict[str, float]:
    """Names for the values of `training_step`; a level is called by its place in the backbone, conv2 the finest."""
    count = len(method.terms)
    named = {"loss": values[0]}
    for part, kind in enumerate(("loss", "spread", "rank")):
        some = values[1 + part * count : 1 + (part + 1) * count]
        named |= {f"{kind}_{term}": value for term, value in zip(method.terms, some, strict=True)}
    return named


def watch(
    fabric: Fabric, method: Any, named: dict[str, float], state: State, total: int, optim: OptimConfig
) -> str | None:
    """Say on stderr which terms newly look collapsed; after COLLAPSED_ROWS such rows return the first's warning."""
    losses, spreads, ranks = ([named[f"{kind}_{term}"] for term in method.terms] for kind in ("loss", "spread", "rank"))
    warnings = collapse_warnings(
        method.terms,
        spreads,
        losses,
        state.step / total,
        ranks=ranks,
        loss_range=method.loss_range,
        judged_from=method.judged_from,
        min_rank=min(MIN_RANK, (optim.batch_size / optim.micro_batches - 1) / 6),
    )
    if warnings and not state.collapsed:
        fabric.print("\n".join(f"warning: step {state.step}: {text}" for text in warnings.values()), file=sys.stderr)
    state.collapsed = state.collapsed + 1 if warnings else 0
    return next(iter(warnings.values())) if state.collapsed >= COLLAPSED_ROWS else None


def memory(fabric: Fabric) -> dict[str, float]:
    """Peak memory of rank 0's process since the start, in GiB: of the host without the data workers, and of the GPU."""
    peaks = {"host_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if fabric.device.type == "cuda":
        peaks["gpu_gib"] = torch.cuda.max_memory_allocated(fabric.device) / 2**30
    return peaks


def export(run: Run, backbone: Backbone, config: PretrainConfig) -> None:
    """Write the hand-off file, the backbone alone, and the record of the run."""
    described = describe(
        stage="pretrain",
        method=config.method.name,
        model=to_plain(config.model),
        skeleton=None,
        config=to_plain(config),
        upstream=None,
        metrics={},
    )
    weights = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    write_export(run.export_path, weights, described)
    run.finish({}, None, torch.get_num_threads())


def announce(
    fabric: Fabric,
    method: Any,
    config: PretrainConfig,
    images: UnlabelledImages,
    base_lr: float,
    total: int,
    state: State,
) -> None:
    """Say on stderr what is about to run."""
    optim = config.optim
    global_batch = optim.batch_size * fabric.world_size
    synced = method.sync_batch_norm and fabric.device.type == "cuda"
    norm = (global_batch if synced else optim.batch_size) // optim.micro_batches
    lines = [
        f"pretrain: {config.method.name}, {len(images)} pictures, {total} steps, {fabric.device.type} "
        f"{config.precision}, {torch.get_num_threads()} threads; batch {global_batch} in all ({optim.batch_size} x "
        f"{fabric.world_size}), batch norm over {norm} per view; lr {base_lr:g} = {optim.base_lr:g} x "
        f"{global_batch} / 256"
    ]
    if len(images) < global_batch:
        lines.append(f"warning: a batch of {global_batch} repeats the {len(images)} pictures; lower optim.batch_size")
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
