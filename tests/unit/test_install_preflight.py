"""What a set-up needs of the machine, and what it says where something is missing."""

import sys
from pathlib import Path

import pytest
from builds import script

from hvdtrain.install import preflight
from hvdtrain.install.preflight import SetupError


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: ... Failed to establish a new connection: [Errno 101]", "index cannot be reached"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: No matching distribution found for torch==99", r"No matching distribution .*\nX failed"),
    ],
)
def test_a_failed_step_is_explained(output, message):
    error = preflight.explain_failure("X", output, Path("x.log"))
    with pytest.raises(SetupError, match=message):
        raise error


def test_too_little_disk_space_is_told_with_its_numbers(tmp_path):
    preflight.check_disk_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(SetupError, match=r"has .* GiB free, and the set-up needs 1048576\.0 GiB"):
        preflight.check_disk_space(tmp_path / "not" / "yet", 2**50)


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", rf"sudo apt-get install g\+\+ make python3\.{sys.version_info.minor}-venv$"),
        ("dnf", r"sudo dnf install gcc-c\+\+ make python3$"),
        (None, r"conda install -c conda-forge gxx make python=3\.12$"),
    ],
)
def test_all_missing_tools_are_told_at_once(tmp_path, monkeypatch, manager, command):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    if manager:
        script(tmp_path / manager, "exit 0")
    with pytest.raises(SetupError, match=rf"^No C\+\+ compiler is on PATH, `make` is not on PATH.*\n.*: {command}"):
        preflight.check_tools(with_build=True, with_venv=True)
    with pytest.raises(SetupError, match=r"cannot make virtual environments\.\n"):
        preflight.check_tools(with_build=False, with_venv=True)
    preflight.check_tools(with_build=False, with_venv=False)


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("3 10", None),
        ("3 13", None),
        ("3 9", r"has Python 3\.9; .* 3\.10 to 3\.13"),
        ("3 14", "3.14"),
        (None, "not run"),
    ],
)
def test_the_python_of_the_active_environment_must_fit(version, says):
    if says is None:
        preflight.check_python(Path("/mine"), version)
    else:
        with pytest.raises(SetupError, match=rf"{says}[\s\S]*deactivate"):
            preflight.check_python(Path("/mine"), version)


def test_a_cuda_torch_without_toolkit_is_told_before_anything_is_installed(tmp_path, monkeypatch):
    for name in ("HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(preflight, "USUAL_CUDA_HOME", tmp_path / "nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    preflight.check_toolkit("2.13.0+cpu", "")
    with pytest.raises(SetupError, match=r"is installed is 2\.14\.1, which is a CUDA build"):
        preflight.check_toolkit("2.14.1", "13.0")
    script(tmp_path / "cuda" / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (tmp_path / "cuda" / "include").mkdir()
    (tmp_path / "cuda" / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    preflight.check_toolkit("2.14.1", "13.0")


def test_a_space_in_the_path_is_told_before_anything_is_fetched(tmp_path):
    preflight.check_folders(tmp_path)
    with pytest.raises(SetupError, match=r"space in the path .*my code.*\n.*move the clone"):
        preflight.check_folders(tmp_path, tmp_path / "my code" / ".venv")
