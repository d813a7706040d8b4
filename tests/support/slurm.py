"""A private Slurm on this machine: munge, a controller and two nodes, all of its files in one directory."""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import debian

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "scontrol")
# Slurm's PMIx plugin loads libpmix.so by that name, which only the package for developers has.
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client", "libpmix-dev")
PMIX = "/usr/lib/*/pmix2/lib/libpmix.so"
NODES = ("node1", "node2")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2
SlurmdParameters=config_overrides
MpiDefault=none
JobRequeue=1
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first_port} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second_port} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES State=UP
"""


def why_not():
    """Return why there can be no Slurm here, "" if there can; installs Debian's packages where that is possible."""
    return debian.why_without(PROGRAMS, PACKAGES, [PMIX])


class Slurm:
    """Started on entering, ended on leaving; `environ` makes Slurm's programs talk to it."""

    def __enter__(self):
        # munge wants a path that others may walk through, which pytest's directories are not.
        base = next(path for path in ("/var/tmp", "/run") if os.access(path, os.W_OK))
        self.folder = Path(tempfile.mkdtemp(prefix="hvdtrain-slurm-", dir=base))
        self.folder.chmod(0o755)
        for name in ("munge", "state", *(f"{kind}-{node}" for kind in ("spool", "tmp") for node in NODES)):
            (self.folder / name).mkdir(mode=0o711)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        port = 20_000 + os.getpid() % 20_000
        values = {"folder": self.folder, "host": os.uname().nodename.split(".")[0], "port": port}
        values |= {"first_port": port + 1, "second_port": port + 2}
        configuration = self.folder / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(**values))
        self.environ = {"SLURM_CONF": str(configuration), "PATH": debian.search_path()}
        munge = [f"--{name}={self.folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self.do("munged", f"--key-file={key}", *munge)
        self.do("slurmctld", "-f", configuration)
        for node in NODES:
            self.do("slurmd", "-f", configuration, "-N", node)
        deadline = time.monotonic() + 30
        while self.do("sinfo", "-h", "-N", "-o", "%T", check=False).split() != ["idle"] * len(NODES):
            if time.monotonic() > deadline:
                raise TimeoutError(f"Slurm does not come up: {(self.folder / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.3)
        return self

    def __exit__(self, *exception):
        self.do("scancel", "--user=root", "--quiet", check=False)
        time.sleep(2)
        for name in (*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid-file"):
            pid = (self.folder / name).read_text().strip() if (self.folder / name).exists() else ""
            if pid:
                subprocess.run(["kill", pid], check=False)
        time.sleep(1)
        shutil.rmtree(self.folder, ignore_errors=True)

    def do(self, *command, check=True, **variables):
        """Run one of Slurm's programs and return its output."""
        environ = os.environ | self.environ | variables
        words = [str(word) for word in command]
        words[0] = shutil.which(words[0], path=debian.search_path()) or words[0]
        done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr}")
        return done.stdout
