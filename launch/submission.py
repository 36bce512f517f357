"""`python -m launch` and `launch resume`: check the graph, record it with its code, and hand it to a cluster."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from poserelay.command import to_plain
from poserelay.errors import UserError
from poserelay.run import differences, write_text

from .attempts import append_event, read_events
from .config import LaunchConfig, ResumeConfig
from .graph import Graph, Job, assignments, build_graph
from .local import run_here, run_local
from .plan import Plan, Submitted, make_launch, read_plan, read_submitted, submitting, write_plan, write_submitted
from .snapshot import PACKAGES, ROOT, git_state, in_snapshot, take_snapshot


def launch(config: LaunchConfig, more: Mapping[str, Sequence[str]], graph_file: str) -> None:
    """Submit a graph, or run it here. `more` as of `build_graph`, `graph_file` the name the user gave.

    Raises UserError before anything is written for whatever is wrong with the graph.
    """
    base = Path.cwd()
    run = Path(os.path.normpath(base / os.path.expanduser(config.run_dir)))
    config = replace(config, run_dir=str(run))
    if run == ROOT or any(run.is_relative_to(ROOT / name) for name in PACKAGES):
        raise UserError(f"run_dir {config.run_dir!r} is the code's own folder; name another one, such as runs/mine")
    # In this process the code is the checkout's.
    code = ROOT if config.cluster == "debug" else run / "launch" / "code"
    try:
        graph = build_graph(config, more, base, partial(in_snapshot, code=code))
    except UserError as error:
        raise UserError(f"{graph_file}: {error}") from error
    plan = Plan(
        run=run,
        cluster=config.cluster,
        graph=graph_file,
        commit=None,
        code=str(code),
        max_requeues=config.max_requeues,
        local=config.local,
        jobs=graph.jobs,
    )
    if config.cluster == "slurm" and not config.dry_run:
        from .slurm import NO_SBATCH

        if not shutil.which("sbatch"):
            raise UserError(NO_SBATCH)
    for name, paths in graph.missing.items():
        problem = f"stage {name}: {paths[0]} is not there" + (f" ({len(paths)} such paths)" if len(paths) > 1 else "")
        if config.cluster != "slurm" and not config.dry_run:
            raise UserError(f"{graph_file}: {problem}, and no stage makes it; mend the path")
        print(f"warning: {problem}, and no stage makes it; the nodes must see it", file=sys.stderr)
    if config.dry_run:
        print(describe(plan, graph))
        return
    written = {**to_plain(config), "more": dict(more)}
    refuse_second(plan, written)
    folder = make_launch(run)
    try:
        commit = take_snapshot(code) if code != ROOT else git_state()[0]
        plan = replace(plan, commit=commit)
        write_configs(plan, graph)
        write_text(folder / "graph.yaml", yaml.safe_dump(written, sort_keys=False))
        write_plan(plan)
    except BaseException as error:  # Ctrl-C, too, leaves nothing
        shutil.rmtree(folder, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{folder}: cannot be written: {error.strerror}; make room or name another run_dir") from error
    with submitting(plan):
        try:
            start(plan, plan.jobs, Submitted())
        except UserError:
            events = [row["event"] for job in plan.jobs for row in read_events(plan.record(job))]
            if "start" not in events:
                shutil.rmtree(folder, ignore_errors=True)  # nothing is queued or has begun
            raise


def refuse_second(plan: Plan, graph: Mapping[str, Any]) -> None:
    """UserError where a launch is in the run directory, saying whether it is of this graph."""
    folder = plan.run / "launch"
    if not (folder / "plan.json").exists():
        return
    try:
        known = yaml.safe_load((folder / "graph.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        known = {}
    changes = differences(known, graph)
    shown = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changes[:3])
    what = f"another graph ({shown}), which `launch resume` goes on with" if changes else "this very graph"
    raise UserError(
        f"{plan.run}: a launch is already here, of {what}; `launch status {plan.typed}` tells how it stands, "
        f"{'another run_dir starts this one' if changes else '`launch resume` goes on with it'}"
    )


def resume(config: ResumeConfig) -> None:
    """Start again what is neither done nor under way. Raises UserError where there is no launch."""
    from .status import job_statuses

    plan = read_plan(config.run)
    with submitting(plan):
        statuses, note = job_statuses(plan, from_here=True)
        if note:
            raise UserError(f"{plan.run}: {note}; nothing was submitted")
        submitted = read_submitted(plan)
        if plan.cluster == "slurm" and submitted.begun:
            from . import slurm

            adopted = slurm.adopt(submitted, (plan.run / "launch").stat().st_uid)
            if adopted:
                slurm.supply(plan, submitted, adopted)
                submitted.begun = {}
                write_submitted(plan, submitted)
        left = {status.name for status in statuses if status.state not in ("done", "running", "pending")}
        if plan.cluster != "slurm":
            left = {status.name for status in statuses if status.state != "done"}
        # A job in the queue waits for an id upstream that will not come back: it is submitted anew with the others.
        waiting = set[str]()
        pending = {status.name for status in statuses if status.state == "pending"}
        for job in plan.jobs:
            if job.name in pending - left and (left | waiting).intersection(job.upstream):
                waiting.add(job.name)
        left |= waiting
        jobs = [job for job in plan.jobs if job.name in left]
        if not jobs:
            print(f"{plan.run}: nothing to start: every job is done, running or pending", file=sys.stderr)
            return
        if config.new_code:
            code = plan.run / "launch" / f"code-{time.strftime('%Y%m%d-%H%M%S')}"
            plan = replace(plan, code=str(code), commit=take_snapshot(code))
            write_plan(plan)
        elif not Path(plan.code).is_dir():
            raise UserError(f"{plan.code}: the code of this launch is gone; `launch resume --new_code` takes this one")
        if plan.cluster == "slurm":
            from . import slurm

            slurm.cancel([submitted.ids[name] for name in waiting if name in submitted.ids])
        submitted.cancelled = [name for name in submitted.cancelled if name not in left]
        submitted.ids = {name: job_id for name, job_id in submitted.ids.items() if name not in left}
        done = {status.name for status in statuses if status.state == "done"}
        submitted.ids = {name: job_id for name, job_id in submitted.ids.items() if name not in done}
        start(plan, jobs, submitted)


def start(plan: Plan, jobs: Sequence[Job], submitted: Submitted) -> None:
    """Hand `jobs` to the plan's cluster; local and debug return when they have ended."""
    if plan.cluster == "slurm":
        from . import slurm

        for array in slurm.submit(plan, jobs, submitted):
            for job in array.jobs:
                append_event(plan.record(job), "submitted", job=submitted.ids[job.name])
            first, last = submitted.ids[array.jobs[0].name], submitted.ids[array.jobs[-1].name]
            span = first if first == last else f"{first} .. {last}"
            print(f"{array.jobs[0].stage}: {len(array.jobs)} submitted as {span}", file=sys.stderr)
        print(f"{plan.run}: `python -m launch status {plan.typed}` tells how it stands", file=sys.stderr)
        return
    submitted.host, submitted.pid = socket.gethostname(), os.getpid()
    write_submitted(plan, submitted)
    for job in jobs:
        append_event(plan.record(job), "submitted", job=None)
    (run_local if plan.cluster == "local" else run_here)(plan, jobs)


def write_configs(plan: Plan, graph: Graph) -> None:
    """Each job's config.yaml. Written plainly: until plan.json is there, the launch is not."""
    for job in plan.jobs:
        record = plan.record(job)
        record.mkdir(parents=True)
        text = yaml.dump(graph.configs[job.name], Dumper=_DUMPER, sort_keys=False)
        (record / "config.yaml").write_text(text, encoding="utf-8")


def describe(plan: Plan, graph: Graph) -> str:
    """What would be submitted: every job's command, what it waits for, its resources, and Slurm's scripts."""
    lines = [f"{len(plan.jobs)} jobs in {plan.run} on {plan.cluster}"]
    for job in plan.jobs:
        resources = job.resources
        lines += [
            "",
            f"{job.name}",
            f"  python -m {job.command} --config {shlex.quote(str(plan.record(job) / 'config.yaml'))}",
            f"  waits for  {', '.join(job.upstream) or '-'}",
            f"  resources  {resources.nodes} x {resources.processes_per_node} processes, "
            f"{resources.gpus} GPUs per node, {resources.cpus} cores per process"
            + (f", {resources.memory:g} GB per node" if resources.memory else "")
            + (f", {job.slurm.time}" if plan.cluster == "slurm" else ""),
        ]
        lines += [f"  {line}" for line in _differing(job, graph)]
    if plan.cluster == "slurm":
        from .slurm import arrays, script

        ids: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for stage in dict.fromkeys(job.stage for job in plan.jobs):
            for array in arrays([job for job in plan.jobs if job.stage == stage], ids, sizes):
                # Slurm gives numbers at submission; here an array is called by its first job.
                name = array.jobs[0].name.replace("_", "-")
                sizes[name] = len(array.jobs)
                for place, job in enumerate(array.jobs):
                    ids[job.name] = f"{name}_{place}" if len(array.jobs) > 1 else name
                lines += ["", f"# script of {', '.join(job.name for job in array.jobs)}", script(plan, array).rstrip()]
    return "\n".join(lines)


def _differing(job: Job, graph: Graph) -> list[str]:
    """The fields of a job that an axis or a hand-off sets, as dotted flags."""
    flat = _flat(graph.configs[job.name])
    folders = [other.folder for other in graph.jobs if other.name in job.upstream]
    swept = assignments(job.axes)
    return [
        f"--{key} {value}"
        for key, value in flat.items()
        if key in swept or any(isinstance(value, str) and value.startswith(folder) for folder in folders)
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
