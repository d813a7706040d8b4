"""What sites install by (conda, EasyBuild, Spack) and what pip is told agree with what a set-up asks for."""

import configparser
import re
from pathlib import Path

import pytest
import yaml

import hvdtrain
from hvdtrain.install import build, mpi, preflight, steps
from hvdtrain.install.preflight import MAXIMUM_PYTHON, MINIMUM_PYTHON

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SPACK = (LAUNCH / "spack.py").read_text()


def dotted(version):
    return ".".join(map(str, version))


def names_in(requirements):
    """Return the packages that lines of requirements name."""
    lines = [line.partition("#")[0].strip() for line in requirements.splitlines()]
    return {re.split(r"[<>=;\[ ]", line)[0].lower() for line in lines if line}


def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def pinned(part):
    return names_in((Path(steps.__file__).parent / f"requirements-{part}.txt").read_text())


def test_a_set_up_ends_with_what_pip_requires():
    """After `pip install hvdtrain && hvdtrain setup` nothing else is there, and all of it must import."""
    required = names_in(setup_cfg()["options"]["install_requires"])
    assert {name.replace("-", "_") for name in required - {"torch", "tomli"}} == {*steps.REQUIRED}
    assert required - pinned("hvdtrain") == {"torch"}


def test_nothing_is_installed_that_nobody_asked_for():
    """Each pin of a clone's set-up is a requirement, or of an extra."""
    config = setup_cfg()
    extras = "\n".join(config["options.extras_require"].values())
    asked = names_in(config["options"]["install_requires"]) | names_in(extras)
    assert pinned("hvdtrain") - asked == {"pillow"}  # torchvision's own, which is installed without what it requires
    assert pinned("test") <= asked


def test_conda_brings_what_a_set_up_asks_of_the_machine():
    asked = yaml.safe_load((LAUNCH / "conda.yaml").read_text())["dependencies"]
    versions = dict(re.match(r"([a-z]+)(.*)", line).groups() for line in asked)
    assert {name.partition("=")[0] for name in preflight._PACKAGES["conda"].values()} <= {*versions}
    assert MINIMUM_PYTHON <= tuple(map(int, versions["python"].strip("=").split("."))) <= MAXIMUM_PYTHON
    assert versions["cmake"] == f">={dotted(mpi.MINIMUM_CMAKE)}"


def test_easybuild_builds_this_version():
    found = {"SOURCE_TAR_GZ": "%(name)s-%(version)s.tar.gz"}
    exec(compile((LAUNCH / "easybuild.eb").read_text(), "easybuild.eb", "exec"), found)
    assert (found["name"], found["version"]) == ("hvdtrain", hvdtrain.__version__)
    assert f"hvdtrain-{hvdtrain.__version__}-" in (LAUNCH / "easybuild.eb").read_text().partition("easyblock")[0]
    versions = {name: tuple(map(int, version.split("."))) for name, version in found["dependencies"]}
    assert MINIMUM_PYTHON <= versions["Python"][:2] <= MAXIMUM_PYTHON
    assert versions["PyTorch"][:2] >= build.MINIMUM_TORCH


@pytest.mark.parametrize(
    ("package", "versions"),
    [
        ("python", f"{dotted(MINIMUM_PYTHON)}:{dotted(MAXIMUM_PYTHON)}"),
        ("py-torch", f"{dotted(build.MINIMUM_TORCH)}:"),
        ("cmake", f"{dotted(mpi.MINIMUM_CMAKE)}:"),
    ],
)
def test_spack_asks_for_what_a_set_up_takes(package, versions):
    assert re.findall(rf'depends_on\("{package}@([^"]+)"', SPACK) == [versions]
