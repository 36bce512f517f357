"""Training of a single-stage pose model (CIR), top to bottom: images -> model -> targets -> losses -> run directory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from poserelay.batch import ImageBatch
from poserelay.checkpoint import (
    describe,
    init_from,
    load_best,
    load_resume,
    restore_training,
    save_best,
    save_resume,
    training_state,
    upstream_of,
    write_export,
)
from poserelay.command import to_plain
from poserelay.datasets.coco import read_coco
from poserelay.datasets.fullimage import FullImageDataset, PyramidDataset, collate_image_draws
from poserelay.datasets.sampling import EpochBatches, steps_per_epoch, training_loader
from poserelay.datasets.training import read_labelled
from poserelay.distributed import StopSignals, on_rank_zero, start, sync_batch_norm, watching_peers
from poserelay.errors import Interrupted, UserError
from poserelay.keypoints import Skeleton, match_joints
from poserelay.model import SingleStageModel, build_single_stage
from poserelay.oks import oks_of_pairs
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount, check_weights
from poserelay.run import Run, file_sha256, is_finished, open_run, running
from poserelay.schedules import drops
from poserelay.scoring import coco_ap, order_of_file
from poserelay.subsets import Chosen, choose_labelled, write_labels
from poserelay.whole_images import predict_dataset, protocol

from .cir_config import CIRConfig
from .cir_targets import (
    centre_areas,
    displacement_loss,
    gaussian_scores,
    quality_loss,
    region_mask,
    score_loss,
    score_weights,
)


@dataclass(frozen=True)
class Data:
    """What a run reads, checked before it starts."""

    skeleton: Skeleton
    labels: Chosen
    training: FullImageDataset
    validation: PyramidDataset | None


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    step: int = 0
    validated: int = 0
    """Step of the last validation."""
    unreadable: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def main(config: CIRConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    upstream = upstream_of(config.init_from) if config.init_from else None
    data = load_data(config)
    fabric = start(config.device, config.precision, config.threads)
    torch.manual_seed(config.seed)
    model = build_single_stage(config.model, data.skeleton)
    if config.init_from:
        for line in init_from(model, config.init_from).lines(config.init_from):
            fabric.print(line, file=sys.stderr)
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "finetune", plain, config.resume))
    with running(run), watching_peers(fabric):
        on_rank_zero(fabric, lambda: write_labels(run_dir, data.labels))
        train(fabric, model, data, config, run, upstream)


def load_data(config: CIRConfig) -> Data:
    """Read and check the annotation files, and that every picture is there."""
    annotations, skeleton = read_labelled(config.data, config.model)
    labels = choose_labelled(annotations, config.labels)
    size = config.model.input.height
    training = FullImageDataset(
        annotations, config.data.images, skeleton, size, augmentation=config.augmentation, rows=labels.rows
    )
    validation = None
    if config.data.validation_annotations:
        truth = read_coco(config.data.validation_annotations)
        order_of_file(skeleton, truth.joints)  # scoring refuses joints that the skeleton does not have
        if not len(truth.persons):
            raise UserError(
                f"{truth.path}: no person with a labelled joint to validate on; check the file, or set "
                "data.validation_annotations to null"
            )
        images = config.data.validation_images or config.data.images
        validation = PyramidDataset(truth, images, size, config.decoding.whole.scales)
    return Data(skeleton, labels, training, validation)


def train(
    fabric: Fabric,
    model: SingleStageModel,
    data: Data,
    config: CIRConfig,
    run: Run | None,
    upstream: dict[str, Any] | None,
) -> None:
    """Set up the optimiser, resume, run all steps, export."""
    folder, world, optim = Path(config.run_dir) / "resume", fabric.world_size, config.optim
    model.backbone.requires_grad_(not config.freeze_backbone)
    global_batch, samples = optim.batch_size * world, len(data.training)
    per_epoch = steps_per_epoch(samples, global_batch)
    total = optim.steps or optim.epochs * per_epoch
    network = fabric.setup_module(sync_batch_norm(model, fabric))
    plain_optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=optim.lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    state = restore_training(load_resume(folder), model, plain_optimizer, fabric, upstream, State(world, samples))
    announce(fabric, config, data, total, global_batch, state)

    batches = EpochBatches(
        samples, optim.batch_size, total, rank=fabric.global_rank, world=world, start_step=state.step
    )
    cuda = fabric.device.type == "cuda"
    loader = training_loader(
        data.training, collate_image_draws, batches, seed=config.seed, workers=config.workers, pin_memory=cuda
    )
    progress = Progress(loader, state.step, total, global_batch, "finetune cir", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    losses = LossWindow()
    set_training(model, config)
    unreadable = UnreadableCount(config.max_unreadable, per_epoch * global_batch, state.unreadable)

    def validation_due() -> bool:
        epochs, rest = divmod(state.step, per_epoch)
        return state.step == total or (state.step > 0 and not rest and epochs % config.validate_every == 0)

    with StopSignals() as signals:
        # A run that ended in a validation has saved the step before it, and owes it.
        if journal and data.validation is not None and validation_due() and state.validated < state.step:
            validate(model, data, config, state, journal, (state.step - 1) // per_epoch)
        for batch in progress:
            epoch = state.step // per_epoch
            reached = epoch if optim.steps is None else state.step
            for group in plain_optimizer.param_groups:
                group["lr"] = drops(optim.lr, reached, optim.drops)
            values = training_step(fabric, network, model, optimizer, batch, config)
            state.step += 1
            losses.add(state.step, torch.stack(list(values.values())), batch.image_ids)
            unreadable.add(batch.replaced)

            ends = state.step == total
            epoch_ends = ends or state.step % per_epoch == 0
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                means = dict(zip(values, losses.flush(fabric), strict=True))
                row = {**means, "unreadable": unreadable.check(fabric), **progress.rates()}
                if journal:
                    journal.write("train", state.step, epoch, {**row, "lr": plain_optimizer.param_groups[0]["lr"]})
                if not row["persons"]:
                    fabric.print(
                        "warning: nobody's centre lay in any crop since the last row, and nothing is learnt of poses; "
                        "are labels outside their pictures, or these much longer than high?",
                        file=sys.stderr,
                    )
            if epoch_ends:
                unreadable.new_epoch()
            validates = data.validation is not None and validation_due()
            if stop or saves or validates:
                check_weights(model, state.step, batch.image_ids)
            if run and (stop or saves or validates):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(model, plain_optimizer, fabric, upstream, state))
            if journal and validates:
                validate(model, data, config, state, journal, epoch)
            if stop:
                raise Interrupted(
                    f"{stop} at step {state.step} of {total}; saved, start the same command again to go on"
                )
    if run and journal:
        journal.close()
        run.heartbeat(state.step, total)
        export(run, model, data, config, state, upstream)
    fabric.barrier()


def training_step(
    fabric: Fabric,
    network: Any,
    model: SingleStageModel,
    optimizer: Any,
    batch: ImageBatch,
    config: CIRConfig,
) -> dict[str, Tensor]:
    """One optimiser step on a batch; returns the loss, its parts, the mean OKS of Eq. 2 in the centre areas and the
    persons that have one per image, by name, on the device."""
    batch = batch.to(fabric.device)
    stride, radius = model.stride, config.loss.radius
    size = (batch.images.shape[-2] // stride, batch.images.shape[-1] // stride)
    keypoints, visibility, person_areas = batch.keypoints / stride, batch.visibility, batch.areas / stride**2
    areas = centre_areas(keypoints, visibility, person_areas, size, radius)
    persons, window = areas.pixels.shape[1:3]
    # The branches have no say about pixels outside the centre areas, so that they are only asked at these.
    maps, displacements = network(model.preprocess(batch.images), areas.pixels.flatten(1, 2))
    displacements = displacements.float().unflatten(1, (persons, window))

    with torch.no_grad():
        poses = areas.pixels[..., None, :] + displacements
        oks = oks_of_pairs(
            poses, keypoints[:, :, None], person_areas[..., None], model.skeleton.sigmas, visibility[:, :, None]
        )
        pose_quality = areas.spread(oks)  # Eq. 2
        weights = score_weights(areas, region_mask(batch.regions, batch.affine, stride, size))
        if config.loss.target == "gaussian":
            target = gaussian_scores(areas)
            weights = torch.where(target > 0, 1.0, weights)
        else:
            target = pose_quality if config.loss.target == "cir" else areas.spread(torch.ones_like(oks))
    parts = {
        "score_loss": score_loss(maps.score.float(), target, weights),
        "displacement_loss": displacement_loss(displacements, keypoints, visibility, areas),
    }
    if maps.quality is not None:
        parts["quality_loss"] = quality_loss(maps.quality.float(), pose_quality, areas)
    factors = {"displacement_loss": config.loss.displacement_weight}
    weighted = [factors.get(name, config.loss.score_weight) * part for name, part in parts.items()]
    loss = torch.stack(weighted).sum()
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    watched = {
        "oks": oks.masked_fill(~areas.owned, 0).sum() / areas.owned.sum().clamp(min=1),
        "persons": areas.owned.any(-1).float().sum() / len(batch),
    }
    return {"loss": loss.detach(), **{name: part.detach() for name, part in parts.items()}, **watched}


def validate(
    model: SingleStageModel, data: Data, config: CIRConfig, state: State, journal: Journal, epoch: int
) -> None:
    """Report metrics on the validation set and remember them in `state`; the best weights are kept where wanted."""
    assert data.validation is not None
    results = predict_dataset(model, data.validation, config.decoding, config.optim.batch_size, config.workers)
    state.validation = coco_ap(data.validation.annotations.path, results, data.skeleton)
    if config.export == "best" and state.validation["AP"] > state.best.get("AP", -1.0):
        state.best = {**state.validation, "step": state.step}
        save_best(Path(config.run_dir) / "resume", model.state_dict())
    state.validated = state.step
    journal.write("validation", state.step, epoch, state.validation)
    set_training(model, config)


def set_training(model: SingleStageModel, config: CIRConfig) -> None:
    """Training mode; the batch norms of a frozen backbone keep their statistics."""
    model.train()
    if config.freeze_backbone:
        model.backbone.eval()


def export(
    run: Run, model: SingleStageModel, data: Data, config: CIRConfig, state: State, upstream: dict[str, Any] | None
) -> None:
    """Write the hand-off file and the record of the run."""
    weights = load_best(run.path / "resume") if config.export == "best" else model.state_dict()
    metrics: dict[str, Any] = dict(state.best if config.export == "best" else state.validation)
    if metrics and data.validation is not None:
        made = protocol(data.validation.annotations, model, config.decoding)
        metrics["protocol"] = {**made, "export": config.export}
    plain = to_plain(config)
    if plain["labels"]["file"]:  # no path in a hand-off file
        plain["labels"]["file"] = file_sha256(Path(plain["labels"]["file"]))
    described = describe(
        stage="finetune",
        method="cir",
        model=to_plain(config.model),
        skeleton=data.skeleton,
        config=plain,
        upstream=upstream,
        metrics=metrics,
    )
    write_export(run.export_path, weights, described)
    run.finish(metrics, upstream, torch.get_num_threads())


def announce(fabric: Fabric, config: CIRConfig, data: Data, total: int, global_batch: int, state: State) -> None:
    """Say on stderr what is about to run, and what about it may surprise."""
    training, optim = data.training, config.optim
    images, regions = len(training), training.regions
    norm = global_batch if fabric.device.type == "cuda" else optim.batch_size
    lines = [
        f"finetune cir: {len(training.persons)} persons on {images} images (of {len(training.annotations.image_ids)}), "
        f"{total} steps, {fabric.device.type} {config.precision}, {torch.get_num_threads()} threads; batch "
        f"{global_batch} images in all ({optim.batch_size} x {fabric.world_size}), batch norm over {norm}; lr "
        f"{optim.lr:g}"
    ]
    if regions:
        lines.append(f"{regions} boxes of crowds and persons without labels on them are no background")
    if without := int((training.annotations.areas[training.persons] == 0).sum()):
        lines.append(
            f"warning: {without} persons have area 0, by which no pose is near theirs: scores are learnt as 0 there; "
            "mend the field area, or leave it out (0.53 of the box is taken)"
        )
    if global_batch != optim.lr_batch:
        lines.append(
            f"warning: lr {optim.lr:g} was chosen for a batch of {optim.lr_batch}, this run has {global_batch}; it is "
            "not rescaled"
        )
    joints = training.annotations.joints
    unused = [
        joint for joint, index in zip(joints, match_joints(data.skeleton.joints, joints), strict=True) if index is None
    ]
    if unused:
        lines.append(f"warning: skeleton {data.skeleton.name} has no {', '.join(unused)}; these labels are not used")
    if images < global_batch:
        lines.append(f"warning: a batch of {global_batch} repeats the {images} images; lower optim.batch_size")
    if data.skeleton.sigmas_assumed:
        lines.append(
            f"warning: the sigmas of skeleton {data.skeleton.name!r} are assumed; CIR's targets and the AP rest on them"
        )
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
