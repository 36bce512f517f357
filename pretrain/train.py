"""Self-supervised pretraining, top to bottom: pictures -> two views -> siamese network -> loss -> run directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from poserelay.checkpoint import describe, load_resume, restore_training, save_resume, training_state, write_export
from poserelay.command import to_plain
from poserelay.datasets.sampling import EpochBatches, steps_per_epoch, training_loader
from poserelay.datasets.unlabelled import FilePictures, UnlabelledImages, coco_images, collate_views, list_images
from poserelay.distributed import StopSignals, on_rank_zero, start, sync_batch_norm
from poserelay.errors import CheckFailed, Interrupted, UserError
from poserelay.model import build_backbone, check_kwargs, normalise
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount
from poserelay.run import Run, is_finished, open_run
from poserelay.schedules import cosine

from .config import PretrainConfig
from .monitors import collapse_warnings, spread
from .mscl import MSCL, mscl_loss
from .views import TwoViews

METHODS = {"mscl": MSCL}


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    step: int = 0
    unreadable: int = 0


def main(config: PretrainConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    images = load_data(config)
    fabric = start(config.device, config.precision, config.threads)
    torch.manual_seed(config.seed)
    model = build_method(config)
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "pretrain", plain, config.resume))
    try:
        train(fabric, model, images, config, run)
    except (CheckFailed, Interrupted, UserError) as reason:
        if run:
            run.status("interrupted" if isinstance(reason, Interrupted) else "failed", str(reason))
        raise
    finally:
        if run:
            run.close()


def load_data(config: PretrainConfig) -> UnlabelledImages:
    """List the pictures."""
    if config.data.annotations:
        files = coco_images(config.data.annotations, config.data.images)
    else:
        files = list_images(config.data.images)
    return UnlabelledImages(FilePictures(files), TwoViews(config.model.input.height))


def build_method(config: PretrainConfig) -> MSCL:
    """The siamese network around the backbone that will be handed off."""
    if config.method.name not in METHODS:
        raise UserError(f"method {config.method.name!r} is not known; choose from {', '.join(METHODS)}")
    check_kwargs("method", config.method, MSCL, given=("backbone", "channels"))
    backbone = build_backbone(config.model.backbone)
    model = METHODS[config.method.name](backbone, backbone.channels, **config.method.kwargs)
    if len(config.loss_weights) != len(model.levels):
        raise UserError(
            f"loss_weights has {len(config.loss_weights)} entries for {len(model.levels)} levels; give one per level"
        )
    return model


def train(fabric: Fabric, model: MSCL, images: UnlabelledImages, config: PretrainConfig, run: Run | None) -> None:
    """Set up the optimiser, resume, run all steps, export."""
    folder, world = Path(config.run_dir) / "resume", fabric.world_size
    global_batch = config.optim.batch_size * world
    per_epoch = steps_per_epoch(len(images), global_batch)
    total = per_epoch * config.optim.epochs
    base_lr = config.optim.base_lr * global_batch / 256
    network = fabric.setup_module(sync_batch_norm(model, fabric))
    plain_optimizer = build_optimizer(model, config, base_lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    state = restore_training(load_resume(folder), model, plain_optimizer, fabric, None, State(world, len(images)))
    announce(fabric, config, images, global_batch, base_lr, total, state)

    batches = EpochBatches(
        len(images), config.optim.batch_size, total, rank=fabric.global_rank, world=world, start_step=state.step
    )
    cuda = fabric.device.type == "cuda"
    loader = training_loader(images, collate_views, batches, seed=config.seed, workers=config.workers, pin_memory=cuda)
    progress = Progress(loader, state.step, total, global_batch, "pretrain", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    losses = LossWindow()
    unreadable = UnreadableCount(config.max_unreadable, per_epoch * global_batch, state.unreadable)
    with StopSignals() as signals:
        for views in progress:
            epoch = state.step // per_epoch
            lr = cosine(base_lr, epoch, config.optim.epochs)
            for group in plain_optimizer.param_groups:
                group["lr"] = base_lr if group["fixed"] else lr
            values = training_step(fabric, network, optimizer, views.images, config)
            state.step += 1
            losses.add(state.step, values, views.names)
            unreadable.add(views.replaced)

            ends, epoch_ends = state.step == total, state.step % per_epoch == 0
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                named = name_values(model, losses.flush(fabric))
                warn_of_collapse(fabric, model, named, state.step / total)
                named |= {"unreadable": unreadable.check(fabric), "lr": lr, **progress.rates()}
                if journal:
                    journal.write("train", state.step, epoch, named)
            if epoch_ends:
                unreadable.count = 0
            if run and (stop or saves):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(model, plain_optimizer, fabric, None, state))
            if stop:
                raise Interrupted(
                    f"{stop} at step {state.step} of {total}; saved, start the same command again to go on"
                )
    if run and journal:
        journal.close()
        run.heartbeat(state.step, total)
        export(run, model, config)
    fabric.barrier()


def training_step(fabric: Fabric, network: Any, optimizer: Any, views: Tensor, config: PretrainConfig) -> Tensor:
    """One optimiser step on views `[2, B, 3, H, W]`; returns loss, loss per level, spread per level, `[1 + 2 L]`."""
    views = views.to(fabric.device, non_blocking=True)
    outputs = network(normalise(views[0], config.model.input), normalise(views[1], config.model.input))
    loss, per_level = mscl_loss(
        [type(level)(*(output.float() for output in level)) for level in outputs], config.loss_weights
    )
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    spreads = torch.stack([spread(level.z1) for level in outputs])
    return torch.cat([loss.detach()[None], per_level.detach(), spreads])


def build_optimizer(model: MSCL, config: PretrainConfig, base_lr: float) -> torch.optim.SGD:
    """SGD with the prediction heads in a group of their own, whose learning rate may stay fixed."""
    heads = list(model.prediction_heads.parameters())
    fixed = {id(parameter) for parameter in heads}
    others = [parameter for parameter in model.parameters() if id(parameter) not in fixed]
    groups = [{"params": others, "fixed": False}, {"params": heads, "fixed": config.optim.fixed_predictor_lr}]
    return torch.optim.SGD(groups, base_lr, momentum=config.optim.momentum, weight_decay=config.optim.weight_decay)


def name_values(model: MSCL, values: list[float]) -> dict[str, float]:
    """Names for the values of `training_step`; a level is called by its place in the backbone, conv2 the finest."""
    levels = [f"conv{level + 2}" for level in model.levels]
    losses, spreads = values[1 : 1 + len(levels)], values[1 + len(levels) :]
    named = {"loss": values[0]}
    named |= {f"loss_{level}": value for level, value in zip(levels, losses, strict=True)}
    return named | {f"spread_{level}": value for level, value in zip(levels, spreads, strict=True)}


def warn_of_collapse(fabric: Fabric, model: MSCL, named: dict[str, float], progress: float) -> None:
    """Say on stderr which levels look collapsed."""
    levels = [f"conv{level + 2}" for level in model.levels]
    spreads, losses = [named[f"spread_{level}"] for level in levels], [named[f"loss_{level}"] for level in levels]
    for warning in collapse_warnings(levels, spreads, losses, progress):
        fabric.print(f"warning: {warning}", file=sys.stderr)


def export(run: Run, model: MSCL, config: PretrainConfig) -> None:
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
    weights = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    write_export(run.export_path, weights, described)
    run.finish({}, None, torch.get_num_threads())


def announce(
    fabric: Fabric,
    config: PretrainConfig,
    images: UnlabelledImages,
    global_batch: int,
    base_lr: float,
    total: int,
    state: State,
) -> None:
    """Say on stderr what is about to run."""
    norm = global_batch if fabric.device.type == "cuda" else config.optim.batch_size
    lines = [
        f"pretrain: {len(images)} pictures, {total} steps, {fabric.device.type} {config.precision}, "
        f"{torch.get_num_threads()} threads; batch {global_batch} in all ({config.optim.batch_size} x "
        f"{fabric.world_size}), batch norm over {norm} per view; lr {base_lr:g} = {config.optim.base_lr:g} x "
        f"{global_batch} / 256"
    ]
    if len(images) < global_batch:
        lines.append(f"warning: a batch of {global_batch} repeats the {len(images)} pictures; lower optim.batch_size")
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
