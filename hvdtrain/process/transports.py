"""What Open MPI need not look for when it starts. Standard library only."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, MutableMapping
from pathlib import Path

TRANSPORTS = "OMPI_MCA_btl"
_OFI = "OMPI_MCA_btl_ofi"
_FILES = ("OMPI_MCA_mca_base_param_files", "OMPI_MCA_mca_param_files")
# What horovodrun passes, which means InfiniBand's old transport and no choice.
_OF_HOROVODRUN = "^openib"


def leave_out_ofi(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have Open MPI start without its transport for one-sided messages over libfabric, unless somebody has chosen any.

    Where no such network is there, that component (5.0.11) sleeps for a second when it has not found one. Horovod sends
    no one-sided messages; two-sided ones over libfabric are another component's (mtl), which stays.
    """
    given = environ.get(TRANSPORTS)
    if any(name.startswith(_OFI) for name in environ):
        return
    if given == _OF_HOROVODRUN:
        environ[TRANSPORTS] = f"{_OF_HOROVODRUN},ofi"
    elif given is None and not any(name in environ for name in _FILES):
        files = [*_files(environ)]
        if files and not any(map(_chooses, files)):
            environ[TRANSPORTS] = "^ofi"


def _files(environ: MutableMapping[str, str]) -> Iterator[Path]:
    """Yield where Open MPI reads settings; nothing where nobody knows where it is installed."""
    program = shutil.which("mpirun", path=environ.get("PATH"))
    prefix = environ.get("OPAL_PREFIX") or (program and str(Path(program).resolve().parent.parent))
    if not prefix:
        return
    yield Path(environ.get("HOME", "/")) / ".openmpi" / "mca-params.conf"
    for folder in (Path(prefix, "etc"), Path(prefix, "etc", "openmpi"), Path("/etc/openmpi")):
        yield folder / "openmpi-mca-params.conf"


def _chooses(file: Path) -> bool:
    """Return whether a file of settings says anything of transports."""
    with contextlib.suppress(OSError):
        return re.search(r"^\s*btl(_ofi\w*)?\s*=", file.read_text(errors="replace"), re.MULTILINE) is not None
    return False
