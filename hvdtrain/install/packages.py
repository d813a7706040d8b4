"""Which torch and torchvision are installed, from which index, and what makes them import."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from hvdtrain.install.environment import Environment, say
from hvdtrain.install.preflight import SetupError, find_cuda, no_toolkit

DEFAULT_TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PACKAGE = Path(__file__).parent
# Appended to torchvision's extension.py where its compiled operators do not fit torch.
_DECLARATIONS = """
# Added by hvdtrain's set-up: the compiled operators of this torchvision are not for the torch beside it. Declared
# without an implementation, they let everything else import; ops.nms and detection models fail when they are called.
torch.library.define("torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def install_torch(environment: Environment, with_horovod: bool) -> None:
    """Install torch unless there is one, the CPU build where there is no CUDA toolkit."""
    requirement = os.environ.get("HVDTRAIN_TORCH") or DEFAULT_TORCH
    if environment.version_of("torch") is None:
        environment.pip("updating pip", "install", "pip>=23.1")  # for `--report`; no network if it is new enough
        index = torch_index(environment, requirement, with_horovod)
        say(f"installing {requirement}")
        environment.pip("installing torch", "install", *index, requirement)


def install_packages(environment: Environment, parts: tuple[str, ...]) -> None:
    """Install the pinned packages of these parts of the requirements, beside the torch that is there.

    Left to itself, pip would put another torch in its place where their demands contradict each other.
    """
    say("installing packages")
    files = [word for part in parts for word in ("--requirement", str(PACKAGE / f"requirements-{part}.txt"))]
    if torch := environment.version_of("torch"):
        kept = environment.folder / "hvdtrain-logs" / "constraints.txt"
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(f"torch=={torch}\n")
        files += ["--constraint", str(kept)]
    environment.pip("installing packages", "install", *files)


def torch_index(environment: Environment, requirement: str, with_horovod: bool) -> list[str]:
    """Return pip's options for the CPU builds of torch where pip would fetch CUDA and there is no CUDA toolkit.

    PyPI's torch for Linux is a CUDA build of several GiB, beside which Horovod cannot be built without nvcc. What a
    mirror or a local folder offers comes first: pip is asked what it would install.

    Raises:
        SetupError: pip has a CUDA build only; nothing was fetched.
    """
    if find_cuda(os.environ):
        return []
    if not _would_be_cuda(environment, requirement, []):
        return []
    index = ["--extra-index-url", CPU_INDEX]
    if with_horovod and _would_be_cuda(environment, requirement, index):
        raise no_toolkit(f"pip would install for {requirement}")
    return index


def _would_be_cuda(environment: Environment, requirement: str, index: list[str]) -> bool:
    report = environment.folder / "hvdtrain-logs" / "torch.json"
    options = ["--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", str(report)]
    environment.pip("looking for torch", "install", *options, *index, requirement)
    return is_cuda_build(json.loads(report.read_text()))


def is_cuda_build(report: dict[str, list[dict[str, dict[str, object]]]]) -> bool:
    """Return whether the torch of pip's installation report depends on CUDA libraries."""
    metadata = report["install"][0]["metadata"]
    dependencies = metadata.get("requires_dist") or []
    assert isinstance(dependencies, list)
    return any(re.match(r"(nvidia|cuda)-", name) for name in dependencies)


def install_torchvision(environment: Environment) -> None:
    """Install the torchvision that matches, unless there is one; afterwards both it and transformers import."""
    torch = environment.version_of("torch") or ""
    if environment.version_of("torchvision") is None:
        version = torchvision_version(torch)
        if version is None:
            say(f"torch {torch} is no release: torchvision is left to you (recipes on pictures need it)")
            return
        # Without dependencies: torchvision from PyPI would replace a CPU torch by a CUDA one.
        index = ["--extra-index-url", CPU_INDEX] if torch.endswith("+cpu") else []
        environment.pip("installing torchvision", "install", "--no-deps", *index, f"torchvision=={version}")
    declare_operators(environment)


def torchvision_version(torch: str) -> str | None:
    """Return torchvision's version for a release of torch: 2.13.0 -> 0.28.0, always 15 minor versions ahead."""
    release = re.fullmatch(r"2\.(\d+)\.(\d+)(\+(cpu|cu\d+))?", torch)
    return f"0.{int(release[1]) + 15}.{release[2]}" if release else None


def declare_operators(environment: Environment) -> None:
    """Make `import torchvision`, where it is installed, work beside a torch that its compiled operators are not for.

    It registers shapes for operators that do not exist then. Seen with PyPI's 0.28.0 (CUDA) and torch 2.13.0+cpu.

    Raises:
        SetupError: it does not import for another reason.
    """
    if environment.version_of("torchvision") is None:
        return
    log = environment.folder / "hvdtrain-logs" / "importing-torchvision.log"
    for _ in range(5):
        try:
            environment.run("importing torchvision", "-c", "import torchvision, torchvision.models")
            return
        except SetupError:
            missing = re.search(r"operator torchvision::(\w+) does not exist", log.read_text(errors="replace"))
            if missing is None:
                break
        found = environment.ask("import importlib.util as u; print(u.find_spec('torchvision').origin)")
        extension = Path(found or "").with_name("extension.py")
        try:
            extension.write_text(extension.read_text() + _DECLARATIONS.format(name=missing[1]))
        except OSError:  # the site's, not ours to change
            break
    torch = environment.version_of("torch") or ""
    fitting = f"torchvision=={torchvision_version(torch)}" if torchvision_version(torch) else "torchvision"
    raise SetupError(
        f"torchvision {environment.version_of('torchvision')} does not import beside torch {torch}; {log} says why.",
        f"python3 -m pip install --no-deps --force-reinstall {fitting}, or python3 -m pip uninstall torchvision",
    )
