"""A real Slurm on this machine: munged, slurmctld and several slurmd in a directory of their own, gone at the end.

Needs root and Debian's packages slurm-wlm and munge; nothing outside the directory is written or started.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

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
        ports = free_ports(nodes + 1)
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
            "TaskPlugin": "task/affinity",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SlurmdParameters": "config_overrides",  # both nodes claim this machine's cores
            "ReturnToService": 2,
            "JobRequeue": 1,
            "KillWait": 120,
            "SlurmdTimeout": 30,
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
        """As a power cut would: the daemon, and the jobs' processes on the node."""
        process = self._processes.pop(node)
        process.kill()
        process.wait()
        for one in self.processes(node):
            _kill(one)

    def processes(self, node: str) -> list[psutil.Process]:
        """Of jobs on the node, and the daemons of their steps."""
        return [process for process in self._ours() if _node_of(process) == node]

    def _ours(self) -> Iterator[psutil.Process]:
        """Whatever runs with this cluster's configuration: its daemons and jobs.

        A step's daemon is nobody's child and writes its title over its environment, but has its node's log open.
        """
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                logs = [file.path for file in process.open_files()] if process.name() == "slurmstepd" else []
                known = process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if known or any(Path(log).parent == self.directory for log in logs):
                    yield process

    def states(self) -> dict[str, str]:
        """Node -> state in words, as sinfo tells."""
        lines = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def hostnames(self, nodes: str) -> list[str]:
        """n[0-1] -> n0, n1."""
        return self.run("scontrol", "show", "hostnames", nodes).split()

    def submit(self, *arguments: str | Path, **variables: str) -> int:
        """The number of a job submitted by sbatch."""
        out = self.run("sbatch", "--parsable", *arguments, **variables)
        return int(out.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
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

    def clear(self) -> None:
        """Cancels all jobs, and waits until their nodes are free."""
        numbers = self.run("squeue", "--noheader", "--format=%A").split()
        if numbers:
            self.run("scancel", *numbers)
        self.until(lambda: self.states() == dict.fromkeys(self.nodes, "idle"), "idle nodes", 180)

    def stop(self) -> None:
        """Ends everything that was started."""
        for process in self._processes.values():
            process.kill()
            process.wait()
        end = time.monotonic() + 10
        while left := list(self._ours()):
            assert time.monotonic() < end, f"still running: {left}"
            for one in left:
                _kill(one)
            time.sleep(0.1)

    def _start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=SEARCH)
        assert program is not None, command
        with (self.directory / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [program, *command[1:]], env=self.environment, stdout=out, stderr=out, start_new_session=True
            )


@contextmanager
def running_cluster(directory: Path, nodes: int, cpus: int = 2) -> Iterator[Cluster]:
    cluster = Cluster(directory, nodes, cpus)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _node_of(process: psutil.Process) -> str | None:
    """The node of a job's process or a step's daemon; None of other daemons."""
    with suppress(psutil.Error):
        if process.name() != "slurmstepd":
            return process.environ().get("SLURMD_NODENAME")
        for file in process.open_files():
            if (name := Path(file.path).name).startswith("slurmd-"):
                return name.removeprefix("slurmd-").removesuffix(".log")
    return None


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()
