"""Build the Dockerfile without a Docker engine: buildah, on a base made of Debian packages, as root.

What this machine's package clients need (mirrors, certificates) goes in by HVDTRAIN_IMAGE_OPTIONS, words for
`buildah build` such as `-v /etc/pip.conf:/etc/pip.conf:ro`.
"""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import debian

PROGRAMS = ("buildah", "debootstrap")
RELEASE = "bookworm"
# What the published image of Debian, too, is without, and keeps out of what is installed later.
LEFT_OUT = ("doc", "info", "locale", "man")
BUILDAH = ["buildah", "--storage-driver", "overlay"]


def why_not():
    """Return why no image can be built here, "" if one can."""
    return debian.why_without(PROGRAMS, PROGRAMS)


def do(*words, timeout=600, check=True):
    """Run buildah and return its standard output."""
    command = [*BUILDAH, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-6000:]}")
    return done


def make_base(tag, cache):
    """Make an image like debian:bookworm-slim, from packages; its files are kept in `cache`."""
    files = cache / f"debian-{RELEASE}"
    if not files.exists():
        new = cache / f"debian-{RELEASE}.new"
        shutil.rmtree(new, ignore_errors=True)
        debootstrap = shutil.which("debootstrap", path=debian.search_path())
        words = [debootstrap, "--variant=minbase", "--include=ca-certificates", RELEASE, str(new)]
        subprocess.run(words, check=True, capture_output=True, timeout=900, stdin=subprocess.DEVNULL)
        new.rename(files)
    excluded = "".join(f"path-exclude /usr/share/{name}/*\n" for name in LEFT_OUT)
    (files / "etc" / "dpkg" / "dpkg.cfg.d" / "slim").write_text(excluded)
    for pattern in ("var/cache/apt/**/*", "var/lib/apt/lists/*", *(f"usr/share/{name}/**/*" for name in LEFT_OUT)):
        for path in files.glob(pattern):
            if path.is_symlink() or path.is_file():
                path.unlink()
    container = do("from", "scratch").stdout.strip()
    do("add", container, files, "/")
    do("commit", container, tag)
    do("rm", container)


def build(tag, folder, **arguments):
    """Build the Dockerfile in `folder`; returns the build's output."""
    given = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    options = shlex.split(os.environ.get("HVDTRAIN_IMAGE_OPTIONS", ""))
    fixed = ["--layers", "--isolation", "chroot", "--network", "host", "--pull-never", "--format", "docker"]
    return do("build", *fixed, *options, *given, "-t", tag, folder, timeout=3000).stdout


class Container:
    """A container of an image, removed at the end."""

    def __init__(self, tag):
        """Make it."""
        self.name = do("from", "--pull-never", tag).stdout.strip()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        do("rm", self.name)

    def run(self, *command, timeout=300, options=()):
        """Run a command in it as the image's user; the host's name resolves in it, which Gloo needs."""
        # --hostname: the default is the container's own name, which resolves nowhere, and Gloo ends with a crash.
        fixed = ["--isolation", "chroot", "--network", "host", "--hostname", os.uname().nodename]
        return do("run", *fixed, *options, self.name, "--", *command, timeout=timeout, check=False)

    def run_read_only(self, *command, timeout=300):
        """Run a command as a user without a name, where nothing but /tmp can be written."""
        root = do("mount", self.name).stdout.strip()
        variables = json.loads(do("inspect", self.name).stdout)["Docker"]["config"]["Env"]
        words = [root, *variables, *command]
        made = ["unshare", "--mount", "--uts", "bash", "-ec", _READ_ONLY, "bash", *map(str, words)]
        return subprocess.run(made, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


# $1 is the root of a container; the rest goes to `env`.
_READ_ONLY = """
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
mount -t tmpfs none "$1/tmp"
for path in proc dev sys etc/hosts; do mount --rbind "/$path" "$1/$path"; done
hostname localhost
exec chroot --userspec=12345:12345 "$1" env -i --chdir=/workspace "${@:2}"
"""


def cache():
    """Return the folder where what is slow to make is kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hvdtrain" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
