"""The set-up of an environment: which torchvision, which MPI, and when the last set-up still holds."""

import subprocess
import sys
from pathlib import Path

import pytest
from builds import check_lock, fake_mpi, script

import hvdtrain
from hvdtrain.install import environment as install
from hvdtrain.install.environment import Environment


@pytest.mark.parametrize(("torch", "vision"), [("2.13.0+cpu", "0.28.0"), ("2.14.1", "0.29.1"), ("2.5.1", "0.20.1")])
def test_torchvision_follows_torch(torch, vision):
    assert install.torchvision_version(torch) == vision


@pytest.mark.parametrize(
    ("requires", "cuda"),
    [
        (["sympy>=1.13", "nvidia-nccl-cu13==2.30"], True),
        (["cuda-toolkit==13"], True),
        (["sympy"], False),
        (None, False),
    ],
)
def test_a_cuda_build_is_known_by_what_it_requires(requires, cuda):
    assert install.is_cuda_build({"install": [{"metadata": {"requires_dist": requires}}]}) is cuda


def test_only_a_whole_mpi_outside_the_environment_is_the_sites(tmp_path, monkeypatch):
    environment = Environment(tmp_path, tmp_path / "environment")
    own, site = environment.folder / "bin", tmp_path / "site"
    fake_mpi(own)
    monkeypatch.setenv("PATH", f"{own}:{site}")
    assert install.site_mpi(environment) is None
    script(site / "mpirun", "true")
    assert install.site_mpi(environment) is None
    script(site / "mpicc", "true")
    assert install.site_mpi(environment) == str(site)


def test_a_second_set_up_waits_for_the_first(tmp_path):
    check_lock(Environment(tmp_path, tmp_path / "environment").lock)


@pytest.mark.parametrize("changed", ["build.py", "requirements.txt", "setup.cfg"])
def test_a_set_up_holds_only_for_the_files_it_was_made_from(tmp_path, monkeypatch, changed):
    package = tmp_path / "hvdtrain" / "install"
    package.mkdir(parents=True)
    files = {"setup.cfg": tmp_path, "build.py": package, "requirements.txt": package}
    for name, folder in files.items():
        (folder / name).write_text("first")
    monkeypatch.setattr(install, "PACKAGE", package)
    environment = Environment(tmp_path, tmp_path / "environment")
    before = install.wanted_stamp(environment)
    assert install.wanted_stamp(environment) == before
    (files[changed] / changed).write_text("second")
    assert install.wanted_stamp(environment)["files"] != before["files"]
    assert not install.is_current(environment)


def test_a_set_up_starts_with_a_bare_python():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hvdtrain.install.__main__, hvdtrain.install.build"
    command = [sys.executable, "-I", "-S", "-c", code, Path(hvdtrain.__file__).parents[1]]  # -S: no site-packages
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
