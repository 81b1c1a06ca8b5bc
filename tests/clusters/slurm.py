"""A Slurm of one node, of this test run alone: in a folder, on ports of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_CPUS = 4  # as Slurm is told, whatever the machine has
_PROGRAMS = {"munged": "munge", "slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-wlm"}

# Jobs are taken from partition low for one of high, and told so 60 seconds before.
_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Slurm:
    """Its commands.

    Args:
        folder: where everything of it is.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def state(self, job: str) -> str:
        """Such as PENDING or RUNNING."""
        fields = self.ask("scontrol", "show", "job", job).split()
        return next(field.removeprefix("JobState=") for field in fields if field.startswith("JobState="))

    def start_soon(self, job: str) -> None:
        """Slurm lets jobs that are queued again wait two minutes; this one only until nodes know that it was ended."""
        self.wait(lambda: self.state(job) == "PENDING", f"job {job} was not queued again")
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now+5")

    def logs(self) -> str:
        """The last lines of all of its logs."""
        parts = []
        for path in sorted(self.folder.glob("slurm*d.log")):
            parts += [f"== {path.name}", *path.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(parts)

    def wait(self, condition: Callable[[], bool], what: str, *, seconds: float = 120) -> None:
        """Until it holds; fails, with the logs, if that takes too long."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}\n{self.logs()}"
            time.sleep(0.1)


def require() -> None:
    """Skips the test, and says what is missing, where Slurm cannot be started."""
    missing = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        pytest.skip(f"a real Slurm was not run: needs the Debian packages {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("a real Slurm was not run: not permitted here: its daemons need root")


@contextmanager
def started(folder: Path) -> Iterator[Slurm]:
    """A Slurm whose node waits for jobs; gone, with all jobs, afterwards. Sets SLURM_CONF."""
    folder.mkdir(parents=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    host = socket.gethostname().split(".")[0]
    with socket.socket() as one, socket.socket() as other:
        one.bind(("", 0))
        other.bind(("", 0))
        ports = {"controller": one.getsockname()[1], "node": other.getsockname()[1]}
    (folder / "slurm.conf").write_text(_CONF.format(host=host, folder=folder, cpus=_CPUS, **ports))
    # Nothing is limited by control groups, but slurmd asks for a plugin of them. This one needs no systemd.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    slurm = Slurm(folder)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = []
    try:
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
            ["slurmctld", "-D", "-c"],
            ["slurmd", "-D"],
        ):
            with (folder / f"{command[0]}.out.log").open("w") as log:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            if command[0] == "munged":
                slurm.wait((folder / "munge.socket").exists, "munge did not start")
        slurm.wait(lambda: "idle" in _sinfo() or _ended(daemons), "the node did not become idle")
        if ended := _ended(daemons):
            pytest.skip(f"a real Slurm was not run: not permitted here: {ended} ended at once\n{slurm.logs()}")
        yield slurm
    finally:
        subprocess.run(["scancel", "--user=root"], capture_output=True, timeout=60)
        with_jobs = time.monotonic() + 30
        while _jobs() and time.monotonic() < with_jobs:
            time.sleep(0.2)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def _ended(daemons: list[subprocess.Popen[bytes]]) -> str:
    """The names of daemons that are not there any more."""
    return ", ".join(str(daemon.args[0]) for daemon in daemons if daemon.poll() is not None)


def _sinfo() -> str:
    return subprocess.run(["sinfo", "--noheader", "--format=%t"], capture_output=True, text=True, timeout=60).stdout


def _jobs() -> str:
    return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, timeout=60).stdout
