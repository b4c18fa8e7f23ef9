"""A real Slurm on this machine: munged, slurmctld and several slurmd in a directory of their own, gone at the end.

Needs root and Debian's packages slurm-wlm and munge; nothing outside the directory is written or started.
"""

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DAEMONS = ("munged", "slurmctld", "slurmd")
SEARCH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


def missing() -> str | None:
    """Why no cluster can be started here; None if one can."""
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name, path=SEARCH) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian's packages slurm-wlm and munge)"
    return None if os.geteuid() == 0 else "slurmd and slurmctld are started as root"


class Cluster:
    """A running cluster of nodes n0, n1, ... on this host.

    Attributes:
        directory: configuration, logs and state.
        environment: for processes that talk to it.
    """

    def __init__(self, directory: Path, nodes: int, cpus: int) -> None:
        self.directory = directory
        self.nodes = [f"n{i}" for i in range(nodes)]
        self.environment = os.environ | {"SLURM_CONF": str(directory / "slurm.conf"), "PATH": SEARCH}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        ports = _free_ports(nodes + 1)
        (directory / "slurm.conf").write_text(self._configuration(ports, cpus))

    def _configuration(self, ports: list[int], cpus: int) -> str:
        here, host = self.directory, socket.gethostname().split(".")[0]
        settings: dict[str, Any] = {
            "ClusterName": "rondo",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": ports[0],
            "SlurmUser": getpass.getuser(),
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={here}/munge.socket",
            "CredType": "cred/munge",
            "StateSaveLocation": here / "state",
            "SlurmdSpoolDir": here / "spool-%n",
            "SlurmctldPidFile": here / "slurmctld.pid",
            "SlurmdPidFile": here / "slurmd-%n.pid",
            "SlurmctldLogFile": here / "slurmctld.log",
            "SlurmdLogFile": here / "slurmd-%n.log",
            "ProctrackType": "proctrack/pgid",
            "TaskPlugin": "task/none",
            "SelectType": "select/linear",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SlurmdParameters": "config_overrides",  # both nodes claim this machine's cores
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 10,
            "SlurmdTimeout": 10,
            "MinJobAge": 3600,
            "SchedulerParameters": "sched_interval=1,bf_interval=1,defer_batch=0",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines += [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        return "\n".join([*lines, "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP", ""])

    def start(self) -> None:
        here = self.directory
        (here / "state").mkdir()
        key = here / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self._start(
            "munged",
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={here}/munge.socket"),
            *(f"--pid-file={here}/munged.pid", f"--log-file={here}/munged.log", f"--seed-file={here}/munge.seed"),
        )
        self.until(lambda: (here / "munge.socket").exists(), "munged's socket", 20)
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "idle nodes", 60)

    def start_node(self, node: str) -> None:
        (self.directory / f"spool-{node}").mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As a power cut would: the daemon and whatever it started."""
        process = self._processes.pop(node)
        for step in _descendants(process.pid):
            _kill(step)
        process.kill()
        process.wait()

    def states(self) -> dict[str, str]:
        """Node -> state in words, as sinfo tells."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def submit(self, *arguments: str | Path, **variables: str) -> int:
        """The number of a job submitted by sbatch."""
        out = self.run("sbatch", "--parsable", *arguments, **variables)
        return int(out.split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, by key."""
        words = self.run("scontrol", "--oneliner", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: int, seconds: float) -> dict[str, str]:
        """The job once it has ended for good."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.job(number)["JobState"] in ends, f"the end of job {number}", seconds)
        return self.job(number)

    def hasten(self, number: int) -> None:
        """Lets a requeued job start at once; Slurm would hold it for two minutes."""
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def hasten_all(self) -> None:
        """`hasten` whatever waits for nothing but that."""
        for line in self.run("squeue", "--noheader", "--format=%A %r").split("\n"):
            number, _, reason = line.partition(" ")
            if reason == "BeginTime":
                self.hasten(int(number))

    def run(self, *arguments: str | Path, **variables: str) -> str:
        command = [str(argument) for argument in arguments]
        done = subprocess.run(
            command, env=self.environment | variables, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
        return done.stdout.strip()

    def until(self, holds: Callable[[], bool], what: str, seconds: float) -> None:
        """Waits for a condition; fails with the daemons' logs where it does not come to hold."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"{what}: not within {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = sorted(self.directory.glob("*.log"))
        return "\n".join(f"--- {file.name}\n" + "\n".join(file.read_text().split("\n")[-25:]) for file in files)

    def stop(self) -> None:
        for process in reversed(self._processes.values()):
            for step in _descendants(process.pid):
                _kill(step)
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=SEARCH)
        assert program is not None, command
        with (self.directory / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )


@contextmanager
def running_cluster(directory: Path, nodes: int = 2, cpus: int = 2) -> Iterator[Cluster]:
    cluster = Cluster(directory, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _descendants(pid: int) -> list[int]:
    """Children before their own."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [*children, *(grandchild for child in children for grandchild in _descendants(child))]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
