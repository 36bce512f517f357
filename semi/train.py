"""Semi-supervised training, top to bottom: labelled and unlabelled persons -> teachers -> losses -> run directory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from poserelay.batch import CropBatch
from poserelay.checkpoint import (
    describe,
    init_from,
    load_resume,
    restore_training,
    save_resume,
    training_state,
    upstream_of,
    verify_handoff,
    write_export,
)
from poserelay.command import to_plain
from poserelay.datasets.sampling import EpochBatches, step_generator, steps_per_epoch, training_loader
from poserelay.datasets.topdown import TopDownDataset, collate_draws
from poserelay.distributed import StopSignals, on_rank_zero, start, sync_batch_norm, watching_peers
from poserelay.errors import Interrupted, UserError
from poserelay.inference import predict_dataset, protocol
from poserelay.model import PoseModel, build_model, check_kwargs, load_top_down
from poserelay.progress import Journal, LossWindow, Progress, UnreadableCount, check_weights
from poserelay.run import Run, file_sha256, is_finished, open_run, running
from poserelay.schedules import drops
from poserelay.scoring import coco_ap
from poserelay.subsets import write_labels

from .config import TRAINING, SemiConfig
from .data import Data, label_once, load_data
from .diagnostics import Watch
from .icon import icon_loss
from .step import SemiStep, Student
from .teachers import TEACHERS, MeanTeacher, matched_rows
from .views import HardViews

# Added to the seed for the unlabelled persons, so that their order and augmentation are not those of the labelled ones.
UNLABELLED_SEED = 2**63


@dataclass
class State:
    """What changes during a run and is saved with it."""

    world: int
    samples: int
    step: int = 0
    unreadable: int = 0
    validation: dict[str, float] = field(default_factory=dict)


def main(config: SemiConfig) -> None:
    """Train, or resume, or find the run finished. Raises UserError, CheckFailed, Interrupted."""
    run_dir, plain = Path(config.run_dir), to_plain(config)
    check_teacher(config)
    if config.resume != "never" and is_finished(run_dir, plain):
        print(f"{run_dir}: already finished", file=sys.stderr)
        return
    upstream = upstreams(config)
    data = load_data(config)
    if config.icon.lambda_p and not config.icon.lambda_1 and not data.skeleton.prcc_pairs:
        raise UserError(
            f"skeleton {data.skeleton.name!r} names no prcc_pairs and icon.lambda_1 is 0: nothing to contrast is left; "
            "add the pairs to its file, or raise icon.lambda_1"
        )
    trained = load_top_down(config.teacher_from) if config.teacher_from else None
    fabric = start(config.device, config.precision, config.threads)
    torch.manual_seed(config.seed)
    networks = [build_model(config.model, data.skeleton) for _ in range(2 if config.teacher.name == "dual" else 1)]
    for number, network in enumerate(networks if config.init_from else []):
        report = init_from(network, str(config.init_from))
        for line in report.lines(str(config.init_from)):
            fabric.print(line, file=sys.stderr)
        if number and report.head_copied:
            same_start(config)
    if trained:
        check_trained(trained, networks[0], str(config.teacher_from))
    step = build_step(config, networks, trained)
    run = on_rank_zero(fabric, lambda: open_run(run_dir, "semi", plain, config.resume))
    with running(run), watching_peers(fabric):
        on_rank_zero(fabric, lambda: write_labels(run_dir, data.labels))
        if trained and config.teacher.kwargs.get("offline"):
            data = label_once(fabric, data, trained, step, config, upstream)
        train(fabric, step, trained, data, config, run, upstream)


def check_teacher(config: SemiConfig) -> None:
    """Raise UserError for an unknown teacher, or one with other arguments."""
    if config.teacher.name not in TEACHERS:
        raise UserError(f"teacher {config.teacher.name!r} is not known; choose from {', '.join(TEACHERS)}")
    given = ("models", "trained")
    check_kwargs("teacher", config.teacher, TEACHERS[config.teacher.name], given=given)


def upstreams(config: SemiConfig) -> dict[str, Any] | None:
    """What the run records of the files that it starts from and learns from."""
    found = upstream_of(config.init_from) if config.init_from else {}
    if config.teacher_from:
        found = {**found, "teacher_sha256": verify_handoff(config.teacher_from)}
    return found or None


def same_start(config: SemiConfig) -> None:
    """Say that the two networks of PoseDual start as one; refuse where nothing would ever tell them apart."""
    if not config.hard.cutout_joints:
        raise UserError(
            f"init_from {config.init_from}: both networks of teacher dual would start from this pose model, see the "
            "same crops (hard.cutout_joints is 0) and stay one; start from its backbone, or cut joints out"
        )
    print(
        f"warning: both networks of teacher dual start from the pose model {config.init_from}; only their cutouts will "
        "tell them apart, a backbone leaves them heads of their own",
        file=sys.stderr,
    )


def check_trained(trained: PoseModel, student: PoseModel, path: str) -> None:
    """Raise UserError where the trained model does not turn the student's crops into heatmaps of the same size."""
    if not all(bool(value.isfinite().all()) for value in trained.state_dict().values()):
        raise UserError(f"teacher_from {path}: its weights hold NaN or infinity; train it again")
    rows = matched_rows(trained.skeleton, student.skeleton)
    lacking = ", ".join(joint for joint, row in zip(student.skeleton.joints, rows, strict=True) if row is None)
    if lacking:
        print(f"warning: {path} lacks {lacking}; these joints are not taught", file=sys.stderr)

    def sizes(model: PoseModel) -> str:
        height, width = model.heatmap_size
        seen = f"{model.input.height} x {model.input.width} ({model.input.alignment})"
        return f"{seen} to heatmaps of {height} x {width}"

    if sizes(trained) != sizes(student):
        raise UserError(
            f"teacher_from {path}: goes from {sizes(trained)}, the student from {sizes(student)}; take a teacher "
            "of the same model.input and head"
        )


def build_step(config: SemiConfig, networks: list[PoseModel], trained: PoseModel | None) -> SemiStep:
    """The networks with their teachers and losses."""
    icon = asdict(config.icon)
    lambda_p, icon_gamma, channels = (icon.pop(name) for name in ("lambda_p", "gamma", "channels"))
    students = [Student(network, channels if lambda_p else 0) for network in networks]
    teachers = TEACHERS[config.teacher.name](networks, trained, **config.teacher.kwargs)
    compat = bool(config.teacher.kwargs.get("compat", False))
    alignment = config.model.input.alignment
    views = HardViews(**asdict(config.hard), alignment=alignment, compat=compat)
    return SemiStep(
        students,
        teachers,
        views=views if config.teacher.name in TRAINING else None,
        contrast=partial(icon_loss, **icon) if lambda_p else None,
        lambda_p=lambda_p,
        icon_gamma=icon_gamma,
        lambda_u=config.lambda_u,
        sigma=config.sigma,
        quantize=config.quantize,
        auxiliary_weight=config.auxiliary_weight,
    )


def train(
    fabric: Fabric,
    step: SemiStep,
    trained: PoseModel | None,
    data: Data,
    config: SemiConfig,
    run: Run | None,
    upstream: dict[str, Any] | None,
) -> None:
    """Set up the optimiser, resume, run all steps, export."""
    folder, world, optim = Path(config.run_dir) / "resume", fabric.world_size, config.optim
    global_batch = optim.batch_size * world
    by_labels = data.unlabelled is None or optim.epoch_of == "labelled"
    per_epoch = steps_per_epoch(
        len(data.labelled if by_labels or not data.unlabelled else data.unlabelled),
        (optim.batch_size if by_labels else optim.unlabelled_batch_size) * world,
    )
    total = optim.steps or per_epoch * optim.epochs
    network = fabric.setup_module(sync_batch_norm(step, fabric))
    step.train()
    if trained:
        trained.to(fabric.device)
    trainable = [parameter for parameter in step.parameters() if parameter.requires_grad]
    plain_optimizer = torch.optim.Adam(trainable, lr=optim.lr)
    optimizer = fabric.setup_optimizers(plain_optimizer)
    samples = len(data.labelled) + len(data.unlabelled or ())
    state = restore_training(load_resume(folder), step, plain_optimizer, fabric, upstream, State(world, samples))
    announce(fabric, config, data, global_batch, total, per_epoch, state)

    loaders = Loaders(data, config, total, state.step, fabric)
    crops = global_batch + (optim.unlabelled_batch_size * world if data.unlabelled else 0)
    progress = Progress(loaders, state.step, total, crops, "semi", fabric.is_global_zero)
    journal = Journal(run, progress, state.step, total) if run else None
    gamma = step.teachers[0].gamma if step.teachers else 0.0
    losses, watch = LossWindow(), Watch(gamma, changes=config.teacher.name in TRAINING)
    unreadable = UnreadableCount(config.max_unreadable, per_epoch * crops, state.unreadable)
    with StopSignals() as signals:
        for labelled, unlabelled in progress:
            epoch = state.step // per_epoch
            for group in plain_optimizer.param_groups:
                group["lr"] = drops(optim.lr, epoch if optim.steps is None else state.step, optim.drops)
            values = training_step(fabric, network, step, optimizer, labelled, unlabelled, config, state.step)
            state.step += 1
            losses.add(state.step, values, [*labelled.image_ids, *(unlabelled.image_ids if unlabelled else ())])
            unreadable.add([*labelled.replaced, *(unlabelled.replaced if unlabelled else ())])

            ends, epoch_ends = state.step == total, state.step % per_epoch == 0
            saves = ends or state.step % config.save_every == 0
            due = epoch_ends or saves or state.step % config.log_every == 0  # the same on every process
            stop = signals.agreed(fabric) if due or world == 1 else None
            if due or stop:
                row = dict(zip(step.terms, losses.flush(fabric), strict=True))
                lr = plain_optimizer.param_groups[0]["lr"]
                rates = {"unreadable": unreadable.check(fabric), "lr": lr, **progress.rates()}
                if journal:
                    journal.write("train", state.step, epoch, {**row, **rates})
                for warning in watch.warnings(row) if journal else ():
                    progress.show(f"warning: {warning}")
            if epoch_ends:
                unreadable.new_epoch()
            validates = ends or (epoch_ends and (epoch + 1) % config.validate_every == 0)
            if journal and data.validation and validates:
                state.validation = validate(step, trained, data, config, state.validation)
                journal.write("validation", state.step, epoch, state.validation)
            if stop or saves:
                check_weights(step, state.step, labelled.image_ids)
            if run and (stop or saves):
                state.unreadable = unreadable.count
                save_resume(folder, training_state(step, plain_optimizer, fabric, upstream, state))
            if stop:
                raise Interrupted(
                    f"{stop} at step {state.step} of {total}; saved, start the same command again to go on"
                )
    if run and journal:
        journal.close()
        run.heartbeat(state.step, total)
        export(run, step, data, config, state, upstream)
    fabric.barrier()


class Loaders:
    """Iterates over (labelled, unlabelled) batches of a run from `start` on; the labelled ones alone without a teacher.

    Either set is gone through in an order of its own, again and again.
    """

    def __init__(self, data: Data, config: SemiConfig, total: int, start: int, fabric: Fabric) -> None:
        def loader(dataset: TopDownDataset, batch_size: int, seed: int) -> Any:
            rank, world = fabric.global_rank, fabric.world_size
            batches = EpochBatches(len(dataset), batch_size, total, rank=rank, world=world, start_step=start)
            cuda = fabric.device.type == "cuda"
            return training_loader(dataset, collate_draws, batches, seed=seed, workers=config.workers, pin_memory=cuda)

        self._labelled = loader(data.labelled, config.optim.batch_size, config.seed)
        self._unlabelled = (
            loader(data.unlabelled, config.optim.unlabelled_batch_size, config.seed + UNLABELLED_SEED)
            if data.unlabelled
            else repeat(None)
        )

    def __iter__(self) -> Iterator[tuple[CropBatch, CropBatch | None]]:
        return iter(zip(self._labelled, self._unlabelled, strict=False))


def training_step(
    fabric: Fabric,
    network: Any,
    step: SemiStep,
    optimizer: Any,
    labelled: CropBatch,
    unlabelled: CropBatch | None,
    config: SemiConfig,
    number: int,
) -> torch.Tensor:
    """One optimiser step, the run's `number`-th from 0; returns the values of `step.terms`, on the device."""
    generator = step_generator(config.seed, number, fabric.global_rank)
    crops = [batch.to(fabric.device) if batch else None for batch in (labelled, unlabelled)]
    values = network(*crops, generator)
    optimizer.zero_grad()
    fabric.backward(values[0])
    optimizer.step()
    for teacher in step.teachers:
        if isinstance(teacher, MeanTeacher):
            teacher.follow(step.models[0], number + 1)
    return values


def networks_of(step: SemiStep) -> dict[str, PoseModel]:
    """The networks that are exported, by name: net1 and net2 where there are two (the mean teacher is the second)."""
    models = step.models + [teacher.model for teacher in step.teachers if isinstance(teacher, MeanTeacher)]
    return {f"net{number + 1}": model for number, model in enumerate(models)}


def validate(
    step: SemiStep, trained: PoseModel | None, data: Data, config: SemiConfig, known: Mapping[str, float]
) -> dict[str, float]:
    """Metrics on the validation set: those of the better network by AP, and the AP of each, of their mean, and of a
    trained teacher, which the validation before may have `known` (of teachers in training it is the networks' own)."""
    assert data.validation is not None
    truth, batch = data.validation.annotations.path, config.optim.batch_size
    found = {}
    for name, model in networks_of(step).items():
        results = predict_dataset(model, data.validation, config.decoding, batch, config.workers)
        found[name] = coco_ap(truth, results, data.skeleton)
    better = max(found, key=lambda name: found[name]["AP"])
    metrics = dict(found[better])
    if len(found) > 1:
        metrics |= {f"{name} AP": values["AP"] for name, values in found.items()}
        metrics["mean AP"] = sum(values["AP"] for values in found.values()) / len(found)
    if "teacher AP" in known:
        metrics["teacher AP"] = known["teacher AP"]
    elif trained and set(trained.skeleton.joints) >= set(data.validation.annotations.joints):
        results = predict_dataset(trained, data.validation, config.decoding, batch, config.workers)
        metrics["teacher AP"] = coco_ap(truth, results, data.skeleton)["AP"]
    step.train()
    return metrics


def export(
    run: Run, step: SemiStep, data: Data, config: SemiConfig, state: State, upstream: dict[str, Any] | None
) -> None:
    """Write the hand-off files, of two networks both and the better as the model, and the record of the run."""
    networks = networks_of(step)
    metrics: dict[str, Any] = dict(state.validation)
    # Without a validation set: the first of two equals, the mean of a student and its mean.
    chosen = "net2" if config.teacher.name == "mean" else "net1"
    if metrics and data.validation:
        chosen = max(networks, key=lambda name: metrics.get(f"{name} AP", 0.0))
        metrics["protocol"] = protocol(data.validation, config.decoding, config.data.validation_boxes)
        if len(networks) > 1:
            metrics["protocol"]["export"] = f"{chosen}, the better by AP on this split"
    plain = to_plain(config)
    for name in ("unlabelled", "teacher_from"):  # paths, of which a hand-off file holds none
        plain.pop(name)
    if config.labels.file:
        plain["labels"]["file"] = file_sha256(Path(config.labels.file))
    described = describe(
        stage="semi",
        method=config.teacher.name + ("+icon" if config.icon.lambda_p else ""),
        model=to_plain(config.model),
        skeleton=data.skeleton,
        config=plain,
        upstream=upstream,
        metrics=metrics,
    )
    for name, model in networks.items() if len(networks) > 1 else ():
        write_export(run.export_path.with_stem(name), model.state_dict(), described)
    write_export(run.export_path, networks[chosen].state_dict(), described)
    run.finish(metrics, upstream, torch.get_num_threads())


def announce(
    fabric: Fabric, config: SemiConfig, data: Data, global_batch: int, total: int, per_epoch: int, state: State
) -> None:
    """Say on stderr what is about to run, and what about it may surprise."""
    optim, world = config.optim, fabric.world_size
    images = len(set(data.labelled.image_index.tolist()))
    method = config.teacher.name + (" + ICON" if config.icon.lambda_p else "")
    unlabelled = "none unlabelled"
    if data.unlabelled:
        source = Path(data.unlabelled.annotations.path).name
        kept = " (the labelled among them)" if config.unlabelled.keep_labelled else ""
        unlabelled = f"{len(data.unlabelled)} unlabelled of {source}{kept}"
    lines = [
        f"semi {method}: {len(data.labelled)} labelled persons on {images} images, {unlabelled}; {total} steps of "
        f"{per_epoch} an epoch, {fabric.device.type} {config.precision}, {torch.get_num_threads()} threads; batch "
        f"{global_batch} labelled ({optim.batch_size} x {world})"
        + (f" + {optim.unlabelled_batch_size * world} unlabelled" if data.unlabelled else "")
        + f"; lr {optim.lr:g}"
    ]
    if global_batch != optim.lr_batch:
        lines.append(
            f"warning: lr {optim.lr:g} was chosen for a batch of {optim.lr_batch}, this run has {global_batch}; it is "
            "not rescaled"
        )
    if len(data.labelled) < global_batch:
        lines.append(
            f"warning: a batch of {global_batch} repeats the {len(data.labelled)} labelled persons; lower "
            "optim.batch_size"
        )
    if config.icon.lambda_p and config.icon.lambda_1 and not data.skeleton.prcc_pairs:
        lines.append(
            f"warning: skeleton {data.skeleton.name!r} names no prcc_pairs; ICON contrasts single joints alone"
        )
    if data.skeleton.sigmas_assumed:
        lines.append(
            f"warning: the sigmas of skeleton {data.skeleton.name!r} are assumed; its AP compares only with itself"
        )
    if state.step:
        lines.append(f"resuming at step {state.step}")
    fabric.print("\n".join(lines), file=sys.stderr)
