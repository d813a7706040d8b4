"""Start a command with faults in this rank's real environment: planted.py FAULT... -- COMMAND...

core             bound to core 0 alone
files            at most 256 open files
threads          rank 1 has another OMP_NUM_THREADS
python=DIR       rank 1 imports from DIR first
shared-memory    16 MiB of /dev/shm (needs a mount namespace)
hosts            a host of its own by name, node0 or node1, with a directory of its own (needs namespaces)
"""

import os
import resource
import subprocess
import sys
import tempfile

NAMESPACES = ["unshare", "--mount", "--uts"]


def can_make_namespaces():
    probe = ["sh", "-c", "mount -t tmpfs none /mnt && hostname node9"]
    try:
        return subprocess.run([*NAMESPACES, *probe], capture_output=True, timeout=10, check=False).returncode == 0
    except OSError:
        return False


def main(words):
    faults, command = words[: words.index("--")], words[words.index("--") + 1 :]
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0"))
    script = []
    for fault in faults:
        name, _, value = fault.partition("=")
        if name == "core":
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        elif name == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        elif name == "threads" and rank == "1":
            os.environ["OMP_NUM_THREADS"] = "3"
        elif name == "python" and rank == "1":
            os.environ["PYTHONPATH"] = value + os.pathsep + os.environ["PYTHONPATH"]
        elif name == "shared-memory":
            script.append("mount -t tmpfs -o size=16m none /dev/shm")
        elif name == "hosts":
            with tempfile.NamedTemporaryFile("w", suffix=".hosts", delete=False) as hosts:
                hosts.write("127.0.0.1 localhost\n127.0.1.1 node0 node1\n")
            script += [f"mount --bind {hosts.name} /etc/hosts", f"hostname node{rank}", f"rm {hosts.name}"]
            script += [f'if [ {rank} = 1 ]; then mount -t tmpfs none "$PWD" && cd "$PWD"; fi']
    if script:
        command = [*NAMESPACES, "sh", "-c", " && ".join([*script, 'exec "$@"']), "sh", *command]
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
