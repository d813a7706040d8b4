"""A few hosts on this machine: Linux namespaces with their own names, addresses, processes, shared memory and sshd.

They share its files, as a cluster's hosts share theirs, and are joined by a bridge. Everything ends with `Hosts`.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import debian

PROGRAMS = ("ip", "sshd", "ssh-keygen", "unshare", "nsenter")
PACKAGES = ("iproute2", "openssh-server", "openssh-client", "util-linux")
NAMESPACES = ["unshare", "--net", "--uts", "--ipc", "--mount", "--propagation", "private", "--pid", "--fork"]

# What process 1 of a host does; it waits for its network card, which is given to it from outside. Who comes by ssh has
# a home of its own: what a shell's start files do in the real one, and lock there, would outlive a host that is killed.
INIT = """
set -e
hostname {name}
mount -t tmpfs -o size=1g none /dev/shm
mount -t tmpfs none /run
mkdir -p /run/sshd {home}/tmp
sed 's#^\\([^:]*:[^:]*:0:[^:]*:[^:]*\\):[^:]*:#\\1:{home}:#' /etc/passwd > {home}/passwd
mount --bind {home}/passwd /etc/passwd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
while ! ip -4 address show dev eth0 2> /dev/null | grep -q inet; do sleep 0.1; done
/usr/sbin/sshd -D -e -f {folder}/sshd_config -o "SetEnv=PATH={path} TMPDIR={home}/tmp" 2> {home}/sshd.log &
wait
"""


def why_not():
    """Return why there can be no such hosts here, "" if there can."""
    reason = debian.why_without(PROGRAMS, PACKAGES)
    if reason:
        return reason
    probe = ["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth1"]
    done = subprocess.run([*NAMESPACES, "--mount-proc", *probe], capture_output=True, timeout=20, check=False)
    return f"no namespaces with network cards: {done.stderr.decode().strip()}" if done.returncode else ""


def long_name(name):
    """Return the other name of a host, like those in Kubernetes: cut at its first dot it is nobody's."""
    return f"worker-{name}.hvdtrain.default.svc"


class Hosts:
    """node1, node2, ... at 10.88.0.1, 10.88.0.2, ...; each has a long name, too."""

    def __init__(self, number, path, first_up=None):
        """Make nothing yet; `path` is the PATH of commands that come by ssh, and the first `first_up` start at once."""
        self.names = [f"node{i + 1}" for i in range(number)]
        self.path = path
        self.first_up = number if first_up is None else first_up
        self.holders = {}
        self.first = {}

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="hvdtrain-hosts-"))
        for name in ("identity", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        shutil.copy(self.folder / "identity.pub", self.folder / "authorized_keys")
        addresses = [f"10.88.0.{i + 1} {name} {long_name(name)}" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *addresses, ""]))
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/identity\n StrictHostKeyChecking no\n BatchMode yes\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n ConnectTimeout 5\n"
        )
        (self.folder / "sshd_config").write_text(
            f"HostKey {self.folder}/host\nAuthorizedKeysFile {self.folder}/authorized_keys\nStrictModes no\n"
            "PermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\nPidFile none\nMaxStartups 100\n"
        )
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self):
        script = "ip link add bridge0 type bridge && ip link set bridge0 up && cat"
        self.switch = self._hold("switch", ["sh", "-c", script])
        self._until(lambda: self._in(self.switch, "ip link show bridge0", check=False) == 0, "the bridge")
        for name in self.names[: self.first_up]:
            self.boot(name)

    def boot(self, name):
        """Start a host that is not there, and wait until it answers."""
        i = self.names.index(name)
        init = INIT.format(name=name, home=self.folder / name, folder=self.folder, path=self.path)
        pid, card = self._hold(name, ["bash", "-c", init]), f"card{i}"
        self._in(self.switch, f"ip link delete {card}", check=False)  # of its life before
        # A card of the same number as in its life before, which others remember for a while.
        address = f"02:88:00:00:00:{i + 1:02x}"
        self._in(self.switch, f"ip link add {card} type veth peer name eth0 address {address} netns {pid}")
        self._in(self.switch, f"ip link set {card} master bridge0 up")
        self._in(pid, f"ip link set lo up && ip link set eth0 up && ip address add 10.88.0.{i + 1}/24 dev eth0")
        self._until(lambda: self._answers(name), f"sshd of {name}", seconds=60)

    def _answers(self, name):
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that came as the card was joined may wait for ever
            return self.do(name, ["ssh", name, "true"], timeout=5).returncode == 0
        return False

    def cut(self, name):
        """Lose all that comes from a host and goes there; nobody is told."""
        self._in(self.switch, f"ip link set card{self.names.index(name)} nomaster")

    def heal(self, name):
        """Join a host that was cut off again."""
        self._in(self.switch, f"ip link set card{self.names.index(name)} master bridge0")

    def kill(self, name):
        """End all processes of a host, whose network card goes with it."""
        self._end(self.holders.pop(name))

    def __exit__(self, *exception):
        for holder in self.holders.values():
            self._end(holder)
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, name, words, **variables):
        """Return the command that runs `words` on the host, in the directory in which it is started."""
        home = self.folder / name
        kept = {"HOME": home, "TMPDIR": home / "tmp", "PATH": self.path, "LANG": "C.UTF-8", **variables}
        enter = ["nsenter", f"--target={self.first[name]}", "--net", "--uts", "--ipc", "--pid", "--mount"]
        return [*enter, f"--wd={Path.cwd()}", "env", "-i", *(f"{k}={v}" for k, v in kept.items()), *words]

    def do(self, name, words, timeout=30, **variables):
        """Run a command on a host."""
        command = [str(word) for word in self.command(name, words, **variables)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def _hold(self, name, command):
        """Start process 1 of new namespaces and return its number."""
        holder = subprocess.Popen([*NAMESPACES, "--kill-child", "--mount-proc", *command], stdin=subprocess.PIPE)
        self.holders[name] = holder
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        self._until(lambda: children.read_text().strip(), name)
        self.first[name] = int(children.read_text())
        return self.first[name]

    def _end(self, holder):
        holder.kill()  # and with it process 1 of the namespace, and with that all others
        holder.wait()
        holder.stdin.close()

    def _in(self, pid, script, check=True):
        done = subprocess.run(
            ["nsenter", f"--target={pid}", "--net", "sh", "-c", script], capture_output=True, text=True
        )
        assert not (check and done.returncode), f"{script}: {done.stderr}"
        return done.returncode

    def _until(self, condition, what, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} does not come up")
            time.sleep(0.1)
