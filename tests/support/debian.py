"""Programs that some tests need: found, or installed from Debian's packages where this user may do that."""

import glob
import os
import shutil
import subprocess


def why_without(programs, packages, files=()):
    """Return why these programs, and files that match patterns, cannot be had, "" if they are there.

    Installs `packages` where one is missing.
    """
    if os.geteuid() != 0:
        return f"{programs[0]} needs root here"
    if all(shutil.which(program, path=search_path()) for program in programs) and all(map(glob.glob, files)):
        return ""
    if shutil.which("apt-get") is None:
        return f"{', '.join(programs)}: not installed, and there is no apt-get"
    install = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *packages]
    environ = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(install, env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        return f"{', '.join(packages)}: apt-get took more than two minutes"
    return f"{', '.join(packages)}: apt-get could not install them" if done.returncode else ""


def search_path():
    """Return PATH with the folders of system programs."""
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
