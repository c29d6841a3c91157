"""A real SLURM on this machine: a controller and nodes, each with a network, a hostname and processes of its own.

The nodes live in Linux namespaces inside one outer namespace, the room, whose first process ends when its standard
input closes. So everything ends with the process that started it, even one that is killed: the kernel ends all
processes of the room, and its networks and mounts go with them.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.launch import ROOT

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "ip")
UNSHARE = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
GPUS = 8
"""Of each node: links to /dev/null, which SLURM hands out as it does real ones."""

SETTINGS = """
ClusterName=test
SlurmctldHost=head
SlurmUser=root
AuthType=auth/munge
# a node takes a requeued job only when the old credential has run out; the default is 2 minutes
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort=6817
SlurmdPort=6818
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait=5
InactiveLimit=0
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
GresTypes=gpu
NodeName={nodes} CPUs=64 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in PROGRAMS if which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed; Debian: apt-get install slurm-wlm munge iproute2"
    if os.geteuid() != 0:  # SLURM's daemons refuse to be the root of a user namespace
        return "its nodes live in namespaces, and those need root"
    done = subprocess.run([*UNSHARE, "--net", "true"], capture_output=True, text=True, check=False)
    return f"no namespaces here, which its nodes live in: {done.stderr.strip()}" if done.returncode else None


def which(name: str) -> str | None:
    """Where a program is; daemons often are not in the path of a user."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for something to become true; AssertionError where it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.1)


class Cluster:
    """A running SLURM. Nodes are called node1, node2, ...; all see the file system of the machine."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.names = folder, [f"node{i + 1}" for i in range(nodes)]
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
        }
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._write_settings()
        self.room = subprocess.Popen(
            [*UNSHARE, "--net", "bash", "-c", "while read -r; do :; done"], stdin=subprocess.PIPE
        )
        wait_until(lambda: psutil.Process(self.room.pid).children(), 10, "the room")
        self.inside = str(psutil.Process(self.room.pid).children()[0].pid)

    def start(self) -> None:
        """Start SLURM and wait until its nodes are ready."""
        self._furnish()
        self._background("munged", "--foreground", "--force", *self._munge_words())
        wait_until((self.folder / "munge" / "socket").exists, 10, "munged")
        self._background("slurmctld", "-D", "-c")
        for name in self.names:
            self.plug_in(name)
            self.power_on(name)
        wait_until(lambda: self.idle() == self.names, 60, "idle nodes")

    def _write_settings(self) -> None:
        folder = self.folder
        for name in ("munge", "state"):
            (folder / name).mkdir(mode=0o700)
        nodes = f"node[1-{len(self.names)}]"
        (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder, nodes=nodes, gpus=GPUS))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for i in range(GPUS):
            (folder / f"gpu{i}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{GPUS - 1}]\n")
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        addresses = ["127.0.0.1 localhost", "10.77.0.1 head"]
        addresses += [f"10.77.0.{i + 11} {name}" for i, name in enumerate(self.names)]
        (folder / "hosts").write_text("\n".join(addresses) + "\n")
        # without this line srun waits for a name server that there is not
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _munge_words(self) -> list[str]:
        munge = self.folder / "munge"
        words = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        return [f"--{word}={munge / name}" for word, name in words.items()]

    def _furnish(self) -> None:
        """The room's own names, and a switch for the nodes' cables."""
        self.run("bash", "-ec", f"""
            hostname head
            mount --bind {self.folder}/hosts /etc/hosts
            mount --bind {self.folder}/nsswitch.conf /etc/nsswitch.conf
            mount -t tmpfs tmpfs /run
            mkdir /run/netns
            ip link set lo up
            ip link add switch type bridge
            ip address add 10.77.0.1/24 dev switch
            ip link set switch up
        """)  # fmt: skip

    def _words(self, words: Sequence[str | Path]) -> list[str]:
        return ["nsenter", "--target", self.inside, "--all", f"--wd={ROOT}", "--", *map(str, words)]

    def _background(self, *words: str) -> subprocess.Popen[bytes]:
        log = open(self.folder / "daemons.log", "ab")  # noqa: SIM115 - the child's
        with log:
            return subprocess.Popen(
                self._words(words), env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def run(self, *words: str | Path, settings: Mapping[str, str] | None = None) -> str:
        """Run a command on the controller; its output, after making sure that it went well."""
        done = subprocess.run(
            self._words(words),
            env=self.environment | dict(settings or {}),
            text=True,
            timeout=60,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}"
        return done.stdout

    def plug_in(self, name: str) -> None:
        """Give a node a network, with a cable to the switch."""
        address = f"10.77.0.{self.names.index(name) + 11}/24"
        self.run("bash", "-ec", f"""
            ip netns add {name}
            ip link add {name} type veth peer name eth0 netns {name}
            ip link set {name} master switch up
            ip -netns {name} link set lo up
            ip -netns {name} address add {address} dev eth0
            ip -netns {name} link set eth0 up
        """)  # fmt: skip

    def power_on(self, name: str) -> None:
        """Start a node, also one that has lost its power. Its first process takes in orphans, as a real one does."""
        self.mend(name)
        start = f"hostname {name}; mount -t tmpfs tmpfs /dev/shm; slurmd -D -N {name} & while :; do wait; sleep 1; done"
        self.nodes[name] = self._background("ip", "netns", "exec", name, *UNSHARE, "bash", "-c", start)

    def power_off(self, name: str) -> None:
        """Take a node's power: nobody hears of it again, and all of its processes are gone."""
        self.cut(name)
        for process in psutil.Process(self.nodes[name].pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.nodes.pop(name).wait()

    def cut(self, name: str) -> None:
        """Pull a node's cable: it goes on alone."""
        self.run("ip", "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put the cable back."""
        self.run("ip", "link", "set", name, "up")

    def on(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command in the network of a node, beside SLURM."""
        return self._background("ip", "netns", "exec", name, *words)

    def idle(self) -> list[str]:
        """The nodes that wait for jobs."""
        done = subprocess.run(
            self._words(["sinfo", "--noheader", "--Node", "--partition=main", "--states=idle", "--format=%N %t"]),
            env=self.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return sorted(line.split()[0] for line in done.stdout.splitlines() if line.split()[1] == "idle")

    def submit(self, *words: str | Path, settings: Mapping[str, str] | None = None) -> str:
        """`sbatch` these words; the number of the job."""
        return self.run("sbatch", "--parsable", *words, settings=settings).strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def close(self) -> None:
        """End everything."""
        self.room.communicate()
        for process in self.nodes.values():
            process.wait()


@contextlib.contextmanager
def running(folder: Path, nodes: int) -> Iterator[Cluster]:
    """A cluster, ended at the end."""
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
