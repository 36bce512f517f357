"""Fine-tuning of a heatmap pose model, top to bottom: data -> model -> loss -> run directory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from poserelay.batch import CropBatch
from poserelay.checkpoint import (
    InitReport,
    describe,
    init_from,
    load_best,
    load_resume,
    read_export,
    restore_training,
    save_best,
    save_resume,
    training_state,
    upstream_of,
    write_export,
)
from poserelay.command import to_plain
from poserelay.datasets.coco import CocoAnnotations, read_coco
from poserelay.datasets.sampling import EpochBatches, PhasedBatches, step_generator, training_loader
from poserelay.datasets.topdown import TopDownDataset, collate_draws
from poserelay.datasets.training import read_labelled, validation_persons
from poserelay.distributed import StopSignals, on_rank_zero, start, sync_batch_norm, watching_peers
from poserelay.errors import Interrupted, UserError
from poserelay.heatmaps import input_to_heatmap
from poserelay.inference import predict_dataset, protocol
from poserelay.keypoints import Skeleton, match_joints
from poserelay.losses import joints_mse
from poserelay.model import PoseModel, build_model
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount, check_weights
from poserelay.run import Run, file_sha256, is_finished, open_run, running
from poserelay.scoring import coco_ap
from poserelay.subsets import Chosen, choose_labelled, drop_labels, write_labels
from poserelay.supervision import auxiliary_loss, gaussian_targets

from .config import SOURCES, FinetuneConfig, SourceConfig
from .hard_negatives import read_hard_negatives
from .mixture import Mixture, Phase, plan_phases
from .structural import Loop, Side, Supervised, constraint_loss, displace, displaced_loss, set_side, side_of


@dataclass(frozen=True)
class Data:
    """What a run reads, checked before it starts."""

    skeleton: Skeleton
    labels: Chosen
    sources: dict[str, TopDownDataset]
    """By letter (`config.SOURCES`); C holds the labelled persons of `data`."""
    validation: TopDownDataset | None
    notes: list[str]
    """What of the labels is not used, for the start."""


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    step: int = 0
    unreadable: int = 0
    validation: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


def main(config: FinetuneConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    upstream = upstream_of(config.init_from) if config.init_from else None
    data = load_data(config)
    # The side whose turn it is not has no gradients, whatever DDP was told when it was set up.
    by_turns = config.model.refiner is not None
    fabric = start(config.device, config.precision, config.threads, unused_parameters=by_turns)
    torch.manual_seed(config.seed)
    model = build_model(config.model, data.skeleton)
    if config.init_from:
        report = init_from(model, config.init_from)
        if config.scio.freeze_base:
            check_frozen(config, report)
        for line in report.lines(config.init_from):
            fabric.print(line, file=sys.stderr)
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "finetune", plain, config.resume))
    with running(run), watching_peers(fabric):
        on_rank_zero(fabric, lambda: write_labels(run_dir, data.labels))
        train(fabric, model, data, config, run, upstream)


def check_frozen(config: FinetuneConfig, report: InitReport) -> None:
    """Raise UserError unless the file of `init_from` is a whole model, which `scio.freeze_base` can leave as it is."""
    path = str(config.init_from)
    if not report.head_copied or report.joints_initialised:
        lacks = "joints " + ", ".join(report.joints_initialised) if report.head_copied else "a head"
        raise UserError(
            f"scio.freeze_base: {path} lacks {lacks}, which would stay untrained; fine-tune it first, or leave "
            "freeze_base out"
        )
    described = read_export(path)[1]
    made = {"model.input.alignment": described["input"]["alignment"], "sigma": described["config"].get("sigma")}
    asked = {"model.input.alignment": config.model.input.alignment, "sigma": config.sigma}
    for name, found in made.items():
        if found not in (None, asked[name]):
            raise UserError(
                f"scio.freeze_base: {path} has {name} {found}, this run {asked[name]}; set --{name} {found}"
            )


def load_data(config: FinetuneConfig) -> Data:
    """Read and check the annotation files, and that every picture is there."""
    everyone, skeleton = read_labelled(config.data, config.model)
    chosen = choose_labelled(everyone, config.labels)
    annotations, labels = drop_labels(everyone, chosen, config.labels)
    notes = []
    if config.labels.drop != "nothing":
        before, after = ((found.visibility[chosen.rows] > 0).sum() for found in (everyone, annotations))
        notes.append(f"labels.drop {config.labels.drop}: {before - after} of {before} labelled joints are taken away")

    def persons(annotations: CocoAnnotations, images: str, **chosen: Any) -> TopDownDataset:
        size, alignment = (config.model.input.height, config.model.input.width), config.model.input.alignment
        return TopDownDataset(
            annotations, images, skeleton, size, augmentation=config.augmentation, alignment=alignment, **chosen
        )

    def others(letter: str, source: SourceConfig) -> TopDownDataset:
        """The persons of another file with a joint of the skeleton."""
        found = read_coco(source.annotations or "")
        known = [column for column in match_joints(found.joints, skeleton.joints) if column is not None]
        rows = found.persons[(found.visibility[found.persons][:, known] > 0).any(axis=1)] if known else found.persons
        if not len(rows):
            raise UserError(
                f"{found.path}: none of its {len(found.persons)} persons has a labelled joint of skeleton "
                f"{skeleton.name}; leave {SOURCES[letter]} out, or name the joints alike"
            )
        if len(rows) < len(found.persons):
            lacking = len(found.persons) - len(rows)
            notes.append(f"{letter} {SOURCES[letter]}: {lacking} persons without a joint of {skeleton.name} left out")
        return persons(found, source.images or "", rows=rows)

    sources = {}
    if config.external.annotations:
        sources["A"] = others("A", config.external)
    sources["C"] = persons(annotations, config.data.images, rows=labels.rows)
    if config.hard_negatives.detections:
        # Of a choice of labels, other pictures are unlabelled: that nobody is annotated there would be a label.
        whole = config.labels.ratio is None and config.labels.count is None and config.labels.file is None
        nobody = read_hard_negatives(
            config.hard_negatives.detections,
            everyone,
            config.hard_negatives.score_threshold,
            None if whole else labels.images,
        )
        sources["H"] = persons(everyone, config.data.images, detections=nobody, negative=True)
    if config.pseudo_labelled.annotations:
        sources["U"] = others("U", config.pseudo_labelled)
    if config.model.refiner:
        seen = np.concatenate([source.visibility > 0 for source in sources.values()])
        unseen = [group.distal for group in skeleton.groups if not seen[:, skeleton.indices([group.distal])].any()]
        if unseen and len(unseen) == len(skeleton.groups):
            raise UserError(
                f"{config.data.annotations}: nobody has a labelled distal joint ({', '.join(unseen)}), which the "
                "networks of model.refiner are to learn; take a file that labels some, or set model.refiner to null"
            )
        notes += [f"warning: nobody has a labelled {joint}, so its group's networks learn nothing" for joint in unseen]
    return Data(skeleton, labels, sources, validation_persons(config.data, config.model, skeleton), notes)


def train(
    fabric: Fabric,
    model: PoseModel,
    data: Data,
    config: FinetuneConfig,
    run: Run | None,
    upstream: dict[str, Any] | None,
) -> None:
    """Set up the optimiser, resume, run all steps, export."""
    folder, world = Path(config.run_dir) / "resume", fabric.world_size
    model.backbone.requires_grad_(not config.freeze_backbone)
    global_batch = config.optim.batch_size * world
    sizes = {letter: len(source) for letter, source in data.sources.items()}
    phases = plan_phases(config, sizes, sizes["C"], global_batch)
    mixture, total = Mixture(list(data.sources.values()), phases), phases[-1].end
    if config.scio.freeze_base:
        for part in (model.backbone, model.head):
            part.requires_grad_(False)
    network = fabric.setup_module(sync_batch_norm(Supervised(model, freeze_base=config.scio.freeze_base), fabric))
    side: Side | None = None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain_optimizer = torch.optim.Adam(trained, lr=config.optim.lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    state = restore_training(load_resume(folder), model, plain_optimizer, fabric, upstream, State(world, len(mixture)))
    announce(fabric, config, data, phases, global_batch, state)

    batches = PhasedBatches(
        [
            EpochBatches(
                sum(phase.drawn),
                config.optim.batch_size,
                phase.steps,
                rank=fabric.global_rank,
                world=world,
                start_step=min(max(0, state.step - phase.first_step), phase.steps),
                first_epoch=phase.first_epoch,
            )
            for phase in phases
        ]
    )
    cuda = fabric.device.type == "cuda"
    loader = training_loader(mixture, collate_draws, batches, seed=config.seed, workers=config.workers, pin_memory=cuda)
    progress = Progress(loader, state.step, total, global_batch, "finetune", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    losses = LossWindow()
    set_training(model, config, side)
    unreadable = UnreadableCount(config.max_unreadable, phases[0].per_epoch * global_batch, state.unreadable)
    with StopSignals() as signals:
        for batch in progress:
            phase = next(phase for phase in phases if state.step < phase.end)
            if state.step == phase.first_step > 0:
                plain_optimizer.state.clear()  # Finetune|theta is a training of its own: Adam starts anew
            epoch = phase.epoch(state.step)
            unreadable.epoch_images = phase.per_epoch * global_batch
            for group in plain_optimizer.param_groups:
                group["lr"] = phase.lr(state.step)
            if model.refiner and side != side_of(epoch):
                side = side_of(epoch)
                set_training(model, config, side)
            generator = step_generator(config.seed, state.step, fabric.global_rank)
            values = training_step(fabric, network, model, optimizer, batch, config, side, generator)
            state.step += 1
            losses.add(state.step, torch.stack(list(values.values())), batch.image_ids)
            unreadable.add(batch.replaced)

            ends = state.step == total
            epoch_ends = state.step == phase.end or phase.epoch_ends(state.step)
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                means = dict(zip(values, losses.flush(fabric), strict=True))  # an epoch has the same losses throughout
                row = {**means, "unreadable": unreadable.check(fabric), **progress.rates()}
                if journal:
                    journal.write("train", state.step, epoch, {**row, "lr": plain_optimizer.param_groups[0]["lr"]})
            if epoch_ends:
                unreadable.new_epoch()
            validates = ends or (epoch_ends and (epoch + 1) % config.validate_every == 0)
            if journal and data.validation and validates:
                journal.write("validation", state.step, epoch, validate(model, data, config, state, folder))
                set_training(model, config, side)
            if stop or saves:
                check_weights(model, state.step, batch.image_ids)
            if run and (stop or saves):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(model, plain_optimizer, fabric, upstream, state))
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
    model: PoseModel,
    optimizer: Any,
    batch: CropBatch,
    config: FinetuneConfig,
    side: Side | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """One optimiser step on a batch; returns the loss and, where it has several, its parts by name, on the device.

    side: of SCIO's networks, the one that is trained. generator: of this step and process.
    """
    batch = batch.to(fabric.device)
    size = model.heatmap_size
    targets, weight = gaussian_targets(batch, model, size, config.sigma, quantize=config.quantize)
    displaced = None
    if model.refiner and side == "verification" and config.scio.perturb_distal:
        crop = (model.input.height, model.input.width)
        true = input_to_heatmap(batch.keypoints, crop, size, model.input.alignment)[:, model.refiner.distal]
        displaced = displace(true, size, config.sigma, config.scio.perturb_distal, generator)
    found = network(model.preprocess(batch.images), side, None if displaced is None else displaced.distal)
    main = joints_mse(found.maps.float(), targets, weight)  # HRNet's half of Eq. 8, which Adam does not see
    parts = {"main_loss": main}
    factors = {
        "main_loss": 0.0 if config.scio.freeze_base else 1.0,
        "auxiliary_loss": config.auxiliary_weight,  # CCM's Eq. 9
        f"{side}_loss": config.scio.weight,
        "displaced_loss": config.scio.weight,
    }
    if found.auxiliary is not None:
        maps = found.auxiliary.float()
        parts["auxiliary_loss"] = auxiliary_loss(maps, batch, model, config.sigma, quantize=config.quantize)
    if found.loop is not None and model.refiner:
        loop = Loop(found.loop.distal.float(), found.loop.verified.float())
        parts[f"{side}_loss"] = constraint_loss(loop, model.refiner, targets, weight, config.scio.norm)
    if displaced is not None and model.refiner:
        maps = found.displaced.float()
        parts["displaced_loss"] = displaced_loss(maps, displaced.share, model.refiner, targets, weight)
    loss = sum((factors[name] * part for name, part in parts.items()), start=torch.zeros_like(main))
    optimizer.zero_grad()
    fabric.backward(loss)
    optimizer.step()
    return {"loss": loss.detach(), **({name: part.detach() for name, part in parts.items()} if len(parts) > 1 else {})}


def validate(model: PoseModel, data: Data, config: FinetuneConfig, state: State, folder: Path) -> dict[str, float]:
    """Metrics on the validation set, remembered in `state`; where the best weights are wanted they are kept."""
    assert data.validation is not None
    results = predict_dataset(model, data.validation, config.decoding, config.optim.batch_size, config.workers)
    state.validation = coco_ap(data.validation.annotations.path, results, data.skeleton)
    if config.export == "best" and state.validation["AP"] > state.best.get("AP", -1.0):
        state.best = {**state.validation, "step": state.step}
        save_best(folder, model.state_dict())
    return state.validation


def set_training(model: PoseModel, config: FinetuneConfig, side: Side | None) -> None:
    """Training mode, of SCIO's networks for `side` alone; the batch norms of what is frozen keep their statistics."""
    model.train()
    if config.freeze_backbone or config.scio.freeze_base:
        model.backbone.eval()
    if config.scio.freeze_base:
        model.head.eval()
    if model.refiner and side:
        set_side(model.refiner, side)


def export(
    run: Run, model: PoseModel, data: Data, config: FinetuneConfig, state: State, upstream: dict[str, Any] | None
) -> None:
    """Write the hand-off file and the record of the run."""
    weights = load_best(run.path / "resume") if config.export == "best" else model.state_dict()
    metrics: dict[str, Any] = dict(state.best if config.export == "best" else state.validation)
    if metrics and data.validation:
        made = protocol(
            data.validation, config.decoding, config.data.validation_boxes, refined=model.refiner is not None
        )
        metrics["protocol"] = {**made, "export": config.export}
    plain = to_plain(config)
    # No path in a hand-off file.
    named = [("labels", "file"), ("hard_negatives", "detections")]
    named += [(source, "annotations") for source in ("external", "pseudo_labelled")]
    for part, name in named:
        if plain[part][name]:
            plain[part][name] = file_sha256(Path(plain[part][name]))
    for source in ("external", "pseudo_labelled"):
        plain[source].pop("images")
    described = describe(
        stage="finetune",
        method=config.model.head.name if config.model.head else "",
        model=to_plain(config.model),
        skeleton=data.skeleton,
        config=plain,
        upstream=upstream,
        metrics=metrics,
    )
    write_export(run.export_path, weights, described)
    run.finish(metrics, upstream, torch.get_num_threads())


def announce(
    fabric: Fabric, config: FinetuneConfig, data: Data, phases: Sequence[Phase], global_batch: int, state: State
) -> None:
    """Say on stderr what is about to run, and what about it may surprise."""
    labelled = data.sources["C"]
    joints = labelled.annotations.joints
    images = len(set(labelled.image_index.tolist()))
    norm = global_batch if fabric.device.type == "cuda" else config.optim.batch_size
    lines = [
        f"finetune: {len(labelled)} persons on {images} images (of {len(labelled.annotations.ids)} "
        f"annotations), {phases[-1].end} steps, {fabric.device.type} {config.precision}, "
        f"{torch.get_num_threads()} threads; batch {global_batch} in all "
        f"({config.optim.batch_size} x {fabric.world_size}), batch norm over {norm}; lr {config.optim.lr:g}"
    ]
    lines += data.notes
    for number, (letter, source) in enumerate(data.sources.items()):
        if len(data.sources) == 1:
            break
        drawn = ", then ".join(str(phase.drawn[number]) for phase in phases)
        lines.append(f"{letter} {SOURCES[letter]}: {drawn} of {len(source)} boxes in an epoch")
        if not any(phase.drawn[number] for phase in phases):
            lines.append(
                f"warning: {SOURCES[letter]} is given, but no phase trains on {letter} (train_on, then.train_on)"
            )
        if letter in "AU":
            theirs, ours = source.annotations.joints, data.skeleton.joints
            missing = [joint for joint, row in zip(ours, match_joints(theirs, ours), strict=True) if row is None]
            unused = [joint for joint, row in zip(theirs, match_joints(ours, theirs), strict=True) if row is None]
            lines += [f"  not supervised there: {', '.join(missing)}"] * bool(missing)
            lines += [f"  not joints of {data.skeleton.name}: {', '.join(unused)}"] * bool(unused)
    if config.model.refiner:
        base = "are frozen" if config.scio.freeze_base else "learn with them"
        epochs = phases[-1].epoch(phases[-1].end - 1) + 1
        lines.append(
            f"scio: {len(data.skeleton.groups)} groups; backbone and head {base}; {epochs} epochs, of the prediction "
            "and the verification networks by turns"
        )
        if epochs < 2:
            lines.append("warning: one epoch trains the prediction networks alone; train for more, or do not search")
    for phase in phases[1:]:
        lines.append(f"from step {phase.first_step} on {phase.letters}, lr {phase.base_lr:g}, {phase.steps} steps")
    if global_batch != config.optim.lr_batch:
        lines.append(
            f"warning: lr {config.optim.lr:g} was chosen for a batch of {config.optim.lr_batch}, this run has "
            f"{global_batch}; it is not rescaled"
        )
    unused = [
        joint for joint, index in zip(joints, match_joints(data.skeleton.joints, joints), strict=True) if index is None
    ]
    if unused:
        lines.append(f"warning: skeleton {data.skeleton.name} has no {', '.join(unused)}; these labels are not used")
    fewest = min(sum(phase.drawn) for phase in phases)
    if fewest < global_batch:
        lines.append(f"warning: a batch of {global_batch} repeats the {fewest} persons; lower optim.batch_size")
    if data.skeleton.sigmas_assumed:
        lines.append(
            f"warning: the sigmas of skeleton {data.skeleton.name!r} are assumed; its AP compares only with itself"
        )
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
