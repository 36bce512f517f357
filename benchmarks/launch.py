"""The launcher's own cost on a Slurm of two nodes on this machine: submitting an array, and starting a job.

    python benchmarks/launch.py [--jobs 200] [--rounds 9] [--json]

`launch_submit` is all of `python -m launch` for a sweep of fine-tuning jobs, held so that none runs, against one bare
`sbatch --array`. `launch_start` is the time from the job script's last line before srun to the start of the stage's
process, against the same `python -m` command in a bare script of the same options; the two take turns. It needs what
tests/slurm_cluster.py needs: root, and `apt-get install slurm-wlm munge`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGE = {"command": "poserelay synthesize", "overrides": {"images": 1, "size": 64, "workers": 1}}
# Read by every Python that starts with it on its path: notes the time and its command.
NOTE = """\
import os, sys, time
with open(os.environ["NOTES"], "a") as file:
    file.write(f"{time.time()} {' '.join(sys.orig_argv)}\\n")
"""


def run(*command: object, **variables: str) -> str:
    """Output of a command in the checkout; SystemExit with its words where it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{command[0]}: exit {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout.strip()


def wait_for_an_empty_queue() -> None:
    while run("squeue", "--noheader"):
        time.sleep(0.1)


def launch(folder: Path, stage: dict, slurm: dict) -> float:
    """Submit a graph of one stage; seconds of the whole command."""
    graph = folder.with_suffix(".yaml")
    graph.write_text(yaml.safe_dump({"run_dir": str(folder), "stages": {"stage": stage}, "slurm": slurm}))
    began = time.perf_counter()
    run(sys.executable, "-m", "launch", "--config", graph)
    return time.perf_counter() - began


def submit_seconds(folder: Path, jobs: int, number: int) -> tuple[float, float]:
    """Of the launcher and of a bare sbatch, for as many jobs."""
    stage = {
        "command": "finetune",
        "config": "finetune/configs/demo.yaml",
        "overrides": {"labels.count": 10},
        "sweep": {"seed": list(range(jobs))},
    }
    ours = launch(folder / f"submit{number}", stage, {"extra": {"hold": True}})
    began = time.perf_counter()
    run("sbatch", "--hold", f"--array=0-{jobs - 1}", "--chdir", folder, "--output=/dev/null", "--wrap", "true")
    peer = time.perf_counter() - began
    queued = run("squeue", "--noheader", "--array", "--format=%i").split()
    if len(queued) != 2 * jobs:
        raise SystemExit(f"{len(queued)} jobs are queued, expected {2 * jobs}")
    run("scancel", "--user", str(os.getuid()))
    wait_for_an_empty_queue()
    return ours, peer


def start_seconds(folder: Path, number: int) -> tuple[float, float]:
    """From a script's last line before srun to the start of the stage's process, of the launcher and of a bare job."""
    found = []
    for side in ("ours", "bare"):
        work = folder / f"{side}{number}"
        notes = work.with_suffix(".notes")
        setup = [f"export NOTES={notes} PYTHONPATH={folder / 'note'}", f'echo "$(date +%s.%N) script" >> {notes}']
        if side == "ours":
            launch(work, STAGE, {"setup": setup})
        else:
            config = (folder / f"ours{number}/launch/jobs/stage/config.yaml").read_text()
            work.mkdir()
            (work / "config.yaml").write_text(re.sub("(?m)^out: .*", f"out: {work / 'out'}", config))
            command = f"srun --unbuffered {sys.executable} -u -m poserelay synthesize --config {work / 'config.yaml'}"
            code = folder / f"ours{number}/launch/code"
            script = [*setup, f"export PYTHONPATH={code}:$PYTHONPATH", command]
            options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60", f"--chdir={code}")
            run("sbatch", *options, f"--output={work / 'log'}", "--wrap", "\n".join(script))
        wait_for_an_empty_queue()
        rows = [line.split(" ", 1) for line in notes.read_text().splitlines()]
        script_time = next(float(seconds) for seconds, what in rows if what == "script")
        found.append(next(float(seconds) for seconds, what in rows if "-m poserelay" in what) - script_time)
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="only the JSON lines")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "note").mkdir()
        (folder / "note/sitecustomize.py").write_text(NOTE)
        cluster = ROOT / "tests/slurm_cluster.py"
        run(sys.executable, cluster, "start", folder / "slurm")
        try:
            os.environ["SLURM_CONF"] = str(folder / "slurm/slurm.conf")
            submits = [submit_seconds(folder, args.jobs, number) for number in range(3)]
            starts = [start_seconds(folder, number) for number in range(args.rounds)]
        finally:
            run(sys.executable, cluster, "stop", folder / "slurm")

    for benchmark, turns, more in [("launch_submit", submits, {"jobs": args.jobs}), ("launch_start", starts[1:], {})]:
        ours, peer = (statistics.median(seconds) for seconds in zip(*turns, strict=True))
        added = [one - other for one, other in turns]
        if not args.json:
            print(f"{benchmark}: {ours:.3f} s against {peer:.3f} s; {min(added):.3f} to {max(added):.3f} s more")
        line = {"benchmark": benchmark, "unit": "s", "ours": round(ours, 3), "peer": round(peer, 3)}
        print(json.dumps(line | {"ratio": round(ours / peer, 2), "added": round(statistics.median(added), 3)} | more))


if __name__ == "__main__":
    main()
