"""A SLURM cluster of two nodes on one machine: munge, slurmctld and two slurmd in namespaces that vanish with their process.

Each node is a network of its own with a host name of its own; the link between them is theirs alone. Nothing of the
machine's own SLURM, munge or network is touched: keys, sockets, states and logs lie in one temporary folder.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "ip": "iproute2"}
FOLDER = Path("/run/proof")  # /run is in memory, and this program's own
NODES = {"alpha1": "10.77.32.1", "alpha2": "10.77.32.2"}

# Nodes claim more CPUs and GPUs than there are: job files run here with the numbers that they are meant for.
CONFIG = """
ClusterName=proof
SlurmctldHost=alpha1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
LaunchParameters=use_interactive_step
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=86400
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0
NodeName=alpha[1-2] CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:8
PartitionName=common Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing_packages():
    """Return the Debian packages that are needed and not there."""
    places = os.environ["PATH"] + ":/usr/sbin:/sbin"
    return sorted({package for name, package in PROGRAMS.items() if shutil.which(name, path=places) is None})


def enter_namespaces():
    """Run this program again as the first process of its own namespaces: what it starts and mounts ends with it."""
    if os.getpid() != 1:
        own = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        os.execvp("unshare", [*own, sys.executable, *sys.orig_argv[1:]])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    run("mount", "-t", "tmpfs", "-o", "mode=755", "none", "/run")


class Cluster:
    """The daemons, and the commands of a user on the first node."""

    def __init__(self) -> None:
        self.folder = FOLDER / "cluster"
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        self.daemons: list[subprocess.Popen] = []

    def start(self):
        """Make the two hosts and start the daemons; returns when both nodes are idle."""
        folder = self.folder
        for path in (folder, folder / "state", *(folder / f"spool-{name}" for name in NODES)):
            path.mkdir()
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder))
        (folder / "gres.conf").write_text("NodeName=alpha[1-2] Name=gpu File=/run/gpu[0-7]\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in NODES.items())
        )
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        self._make_hosts()
        for number in range(8):
            run("mknod", f"/run/gpu{number}", "c", 1, 3)  # nothing, in the place of a GPU; no program here opens it
        self._daemon(
            "munged", "--foreground", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
            f"--log-file={folder}/munged.log", f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        wait_until(lambda: Path(f"{folder}/munge.socket").exists(), "munge's socket", 10)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D", "-N", "alpha1")
        self._daemon("ip", "netns", "exec", "alpha2", "unshare", "--uts", "sh", "-c",
                     "hostname alpha2; exec slurmd -D -N alpha2")  # fmt: skip
        wait_until(
            lambda: self.ask("sinfo", "-h", "-p", "common", "-o", "%D %t").split() == ["2", "idle"], "idle nodes", 60
        )

    def _make_hosts(self):
        """This namespace becomes the first host; the second one is a network inside it."""
        run("mount", "--bind", self.folder / "hosts", "/etc/hosts")
        run("hostname", "alpha1")
        run("ip", "netns", "add", "alpha2")
        run("ip", "link", "add", "link1", "type", "veth", "peer", "name", "link2", "netns", "alpha2")
        for name, inside in (("1", []), ("2", ["-n", "alpha2"])):
            run("ip", *inside, "addr", "add", f"{NODES['alpha' + name]}/24", "dev", f"link{name}")
            run("ip", *inside, "link", "set", f"link{name}", "up")
            run("ip", *inside, "link", "set", "lo", "up")

    def _daemon(self, *command):
        log = (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("w")
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def ask(self, *command, check=True, timeout=60):
        """Return what a command of SLURM prints."""
        done = subprocess.run(
            list(map(str, command)), env=self.environment, capture_output=True, text=True, timeout=timeout
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def stop(self):
        """End the jobs and the daemons, the last one first."""
        self.ask("scancel", "--signal=KILL", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def run(*command):
    subprocess.run(list(map(str, command)), check=True)


def wait_until(condition, what, seconds):
    """Poll until ``condition()`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.2)
