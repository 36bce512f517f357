"""A real Slurm of two nodes on this machine for tests of the launcher: munged, slurmctld and two slurmd in one folder.

    python tests/slurm_cluster.py start FOLDER [GRACE_SECONDS]
    export SLURM_CONF=FOLDER/slurm.conf     # sbatch, srun, squeue and scontrol now talk to it
    python tests/slurm_cluster.py stop FOLDER

Partitions `low` (the default) and `high`, whose jobs preempt and requeue those of `low`. Each node claims four CPUs,
64 GB and two GPUs whatever the machine has, so that several jobs run at once. The daemons live in a mount namespace
whose /etc/hosts also names n1 and n2, and each slurmd has the node's name as its host name: a job resolves the nodes
and sees two hosts, and nothing outside the folder changes. It needs root, and `apt-get install slurm-wlm munge`.

What does not scale down (Slurm 22.05): slurmctld looks at time limits every 30 s, so `--signal=USR2@N` comes N to
N + 30 s before the limit, a job ends up to 30 s after it, and a grace time lasts up to 30 s longer. A requeued job
starts again about 10 s later: it ends (KillWait at most), then waits for its credential to expire.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2")
DAEMONS = ("munged", "slurmctld", *NODES)

CONF = """\
ClusterName=poserelay
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A credential is revoked until it expires: a requeued job waits this long (120 s by default) before it may start again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldDebug=verbose
SlurmdDebug=verbose
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
# Jobs that ended stay known: a test may ask for one at any later time, however slow the machine.
MinJobAge=86400
InactiveLimit=0
OverTimeLimit=0
SlurmctldTimeout=60
SlurmdTimeout=60
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=n1 NodeAddr=127.0.0.1 Port={n1_port} {node}
NodeName=n2 NodeHostname=n2 NodeAddr=127.0.0.1 Port={n2_port} {node}
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime={grace_time} MaxTime=INFINITE State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
NODE = "CPUs=4 Boards=1 SocketsPerBoard=1 CoresPerSocket=4 ThreadsPerCore=1 RealMemory=64000 Gres=gpu:2 State=UNKNOWN"

# One mount namespace for all daemons: `stop` finds every process of the cluster by it, whatever started the process.
START = """\
set -e
mount --bind hosts /etc/hosts
munged --force --key-file="$PWD/munge.key" --socket="$PWD/munge.socket" --pid-file="$PWD/munged.pid" \
  --log-file="$PWD/munged.log" --seed-file="$PWD/munge.seed"
slurmctld -c
for node in n1 n2; do
  unshare --uts sh -c 'hostname "$1" && slurmd -c -N "$1"' slurmd "$node"
done
"""


@dataclass(frozen=True)
class Cluster:
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, seconds: float = 60) -> str:
        """The output of a command, `sbatch --parsable ...` for one. Raises RuntimeError with its stderr if it fails."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job` (JobState, Reason, Restarts, ...) of a job or an array task `ID_1`."""
        line = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in line.splitlines()[0].split() if "=" in field)

    def wait(self, job: str, *states: str, seconds: float = 30) -> dict[str, str]:
        """The job's fields once its JobState is one of `states`. Raises TimeoutError with the last fields."""
        until = time.monotonic() + seconds
        while (fields := self.job(job))["JobState"] not in states:
            if time.monotonic() > until:
                raise TimeoutError(f"job {job} not {' or '.join(states)} within {seconds} s: {fields}")
            time.sleep(0.1)
        return fields


def missing() -> str | None:
    """Why a cluster cannot be started here; None if it can."""
    absent = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "a Slurm cluster for tests needs root"
    command = ["unshare", "--mount", "--uts", "sh", "-c", "mount --bind /etc/hosts /etc/hosts && hostname n1"]
    namespaces = subprocess.run(command, capture_output=True, text=True, check=False)
    if namespaces.returncode:
        return f"a Slurm cluster for tests needs its own mount and UTS namespaces: {namespaces.stderr.strip()}"
    return None


def start(folder: Path, grace_time: int = 0) -> Cluster:
    """Start the daemons in `folder`, with no jobs, and wait until both nodes are idle.

    `grace_time`: seconds between the SIGTERM to the steps of a preempted job and its requeue; 0 requeues it at once.
    Raises RuntimeError if a cluster runs there already or the nodes do not come up.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if daemons(folder):
        raise RuntimeError(f"{folder}: a cluster runs here already; stop it first")
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    for name in DAEMONS:
        for ending in ("pid", "log"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {node}\n" for node in NODES))
    ctld_port, *node_ports = free_ports(1 + len(NODES))
    conf = CONF.format(
        host=socket.gethostname().split(".")[0],
        folder=folder,
        ctld_port=ctld_port,
        n1_port=node_ports[0],
        n2_port=node_ports[1],
        node=NODE,
        grace_time=grace_time,
    )
    (folder / "slurm.conf").write_text(conf)
    # A node has the GPUs whose device files it has: two that every machine has.
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
    cluster = Cluster(folder)
    with (folder / "start.log").open("w") as log:
        started = subprocess.run(
            ["unshare", "--mount", "sh", "-c", START],
            cwd=folder,
            env=os.environ | cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=False,
        )
    until = time.monotonic() + 30
    while started.returncode == 0 and time.monotonic() < until:
        with contextlib.suppress(RuntimeError):
            if cluster.run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * len(NODES):
                return cluster
        time.sleep(0.1)
    stop(folder)
    logs = [path.read_text()[-1500:] for name in ("start", *DAEMONS) if (path := folder / f"{name}.log").exists()]
    raise RuntimeError(f"{folder}: the cluster did not come up:\n" + "\n".join(logs))


def stop(folder: Path) -> None:
    """Kill the daemons of `folder` and whatever their jobs left running. Nothing running there is no error."""
    folder = folder.resolve()
    namespaces = {namespace(pid) for pid in daemons(folder).values()} - {None, namespace(os.getpid())}
    until = time.monotonic() + 10
    while time.monotonic() < until:
        processes = [pid for pid in all_processes() if namespace(pid) in namespaces]
        if not processes:
            break
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def daemons(folder: Path) -> dict[str, int]:
    """The process of each daemon of `folder` that is alive."""
    alive: dict[str, int] = {}
    for name in DAEMONS:
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = int((folder / f"{name}.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
            if Path(command).name == ("slurmd" if name in NODES else name):  # and not another that got the same pid
                alive[name] = pid
    return alive


def namespace(pid: int) -> str | None:
    """The mount namespace of a process; None if it is gone."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/mnt")
    return None


def all_processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


@contextlib.contextmanager
def slurm_cluster(folder: Path, grace_time: int = 0) -> Iterator[Cluster]:
    """A cluster in `folder` (see `start`), with SLURM_CONF pointing to it in this process; stopped at the end."""
    before = os.environ.get("SLURM_CONF")
    try:
        cluster = start(folder, grace_time)
        os.environ.update(cluster.environment)
        yield cluster
    finally:
        stop(folder)
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["start", folder, *grace] if len(grace) <= 1:
            reason = missing()
            if reason:
                print(reason, file=sys.stderr)
                return 2
            cluster = start(Path(folder), *map(int, grace))
            print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
        case ["stop", folder]:
            stop(Path(folder))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
