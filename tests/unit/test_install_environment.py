"""The set-up of an environment: which torch and torchvision, which MPI, and when the last set-up still holds."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pip
import pytest
from builds import check_lock, fake_mpi, make_environment, script
from patience import wait_for

import hvdtrain
from hvdtrain.install import mpi, packages, steps
from hvdtrain.install.__main__ import install_into_environments, parse
from hvdtrain.install.build import WheelCache
from hvdtrain.install.environment import Environment, plain_environ
from hvdtrain.install.preflight import SetupError
from hvdtrain.install.steps import Setup


@pytest.mark.parametrize(
    ("torch", "vision"),
    [
        ("2.13.0+cpu", "0.28.0"),
        ("2.14.1", "0.29.1"),
        ("2.6.0+cu124", "0.21.0"),
        ("2.9.0a0+50eac811a6.nv25.09", None),
        ("2.9.0a0+git1234", None),
    ],
)
def test_torchvision_follows_a_release_of_torch(torch, vision):
    assert packages.torchvision_version(torch) == vision


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
    assert packages.is_cuda_build({"install": [{"metadata": {"requires_dist": requires}}]}) is cuda


@pytest.mark.parametrize(
    ("offers", "with_horovod", "index"),
    [
        (["cpu"], True, []),
        (["cuda", "cpu"], True, ["--extra-index-url", packages.CPU_INDEX]),
        (["cuda", "cuda"], True, None),
        (["cuda", "cuda"], False, ["--extra-index-url", packages.CPU_INDEX]),
    ],
)
def test_a_cuda_torch_without_toolkit_is_refused_before_it_is_fetched(
    environment, monkeypatch, offers, with_horovod, index
):
    """A stand-in for pip answers the questions in turn; it would fail if it were asked to install."""
    monkeypatch.setattr(packages, "find_cuda", lambda environ: None)
    for i, offer in enumerate(offers):
        requires = '["nvidia-nccl-cu13"]' if offer == "cuda" else "[]"
        report = f'{{"install": [{{"metadata": {{"requires_dist": {requires}}}}}]}}'
        (environment.folder / f"offer{i}").write_text(report)
    logs = environment.folder / "hvdtrain-logs"
    logs.mkdir()
    pip = 'case "$*" in *--dry-run*) ;; *) exit 1;; esac; cd "$(dirname "$0")/.."; set -- offer*'
    script(environment.python, f"{pip}; mv $1 {logs}/torch.json")
    if index is None:
        with pytest.raises(SetupError, match=r"pip would install for torch==9 is a CUDA build, and there is no CUDA"):
            packages.torch_index(environment, "torch==9", with_horovod)
    else:
        assert packages.torch_index(environment, "torch==9", with_horovod) == index


@pytest.fixture
def environment(tmp_path):
    """A folder whose Python says that no package is installed."""
    script(tmp_path / "environment" / "bin" / "python", "exit 0")
    return Environment(tmp_path / "environment")


def test_only_a_whole_mpi_outside_the_environment_is_the_sites(environment, tmp_path, monkeypatch):
    own, site = environment.folder / "bin", tmp_path / "site"
    fake_mpi(own)
    monkeypatch.setenv("PATH", f"{own}:{site}")
    assert mpi.site_mpi(environment) is None
    script(site / "mpirun", "true")
    assert mpi.site_mpi(environment) is None
    script(site / "mpicc", "true")
    assert mpi.site_mpi(environment) == str(site)


def test_an_mpi_of_the_environment_is_kept(environment, tmp_path, monkeypatch):
    """conda's or PyPI's mpich: first on PATH wherever the environment is active, so it is the one to build for."""
    fake_mpi(tmp_path / "site")
    monkeypatch.setenv("PATH", f"{tmp_path / 'site'}:/usr/bin:/bin")
    assert mpi.chosen_mpi(environment) == f"MPI of this machine, in {tmp_path / 'site'}"
    fake_mpi(environment.folder / "bin")
    assert mpi.chosen_mpi(environment) == f"MPI of the environment {environment.folder}"
    script(environment.python, "echo 5.0.11")  # every package is installed, the wheel of Open MPI too
    assert mpi.chosen_mpi(environment) == f"MPI of this machine, in {tmp_path / 'site'}"


def test_a_second_set_up_waits_for_the_first(environment):
    check_lock(environment.lock)


KILLED = """
import os, sys
from pathlib import Path
from hvdtrain.install.environment import Environment
environment = Environment(Path(sys.argv[1]))
with environment.lock():
    print("locked", flush=True)
    environment.run("pip", "-c", sys.argv[2], program=sys.executable)
"""
WRITES = """
import time
from pathlib import Path
Path("{folder}/begun").touch()
while not Path("{folder}/may-end").exists():
    time.sleep(0.05)
time.sleep(0.5)
Path("{folder}/ended").touch()
"""


@pytest.mark.slow
def test_what_a_killed_set_up_has_started_keeps_others_out(tmp_path):
    """Its pip still writes into the environment."""
    environment = Environment(tmp_path)
    command = [sys.executable, "-c", KILLED, str(tmp_path), WRITES.format(folder=tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        wait_for((tmp_path / "begun").exists)
        first.kill()
    (tmp_path / "may-end").touch()
    with environment.lock():
        assert (tmp_path / "ended").exists()


def test_a_file_system_without_locks_is_no_obstacle(environment, tmp_path, monkeypatch, capsys):
    """Lustre without `-o flock`: "Function not implemented"."""

    def flock(file, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with environment.lock():
        pass
    assert "has no locks (Function not implemented)" in capsys.readouterr().out
    cache = WheelCache(tmp_path / "cache")
    (tmp_path / "horovod.whl").write_bytes(b"a wheel")
    with cache.lock("key"):
        first = cache.store("key", tmp_path / "horovod.whl")
        assert cache.store("key", tmp_path / "horovod.whl") == first == cache.find("key")  # another one was faster


def test_an_environment_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    lock = Environment(tmp_path / "file" / "environment").lock()
    with pytest.raises(SetupError, match=r"environment cannot be written \(Not a directory\)"), lock:
        pass


@pytest.mark.parametrize(
    ("old", "quoted"),  # as the venv of various Pythons writes it
    [
        ("/home/me/old/.venv", "'{}'"),
        ("/home/me/old/.venv", '"{}"'),
        ("/home/me/old/.venv", "{}"),
        ("/home/mö/my old code/.venv", '"{}"'),
    ],
)
def test_a_moved_environment_names_its_new_folder(environment, old, quoted):
    bin_ = environment.folder / "bin"
    (bin_ / "activate").write_text(f"VIRTUAL_ENV=$(cygpath x)\n export VIRTUAL_ENV={quoted.format(old)}\n")
    (bin_ / "horovodrun").write_text(f"#!{old}/bin/python\nimport sys; '{old}2'\n")
    (bin_ / "cmake").write_bytes(b"\x7fELF\0" + old.encode())
    (environment.folder / "pyvenv.cfg").write_text(f"home = /usr/bin\ncommand = python3 -m venv {old}\n")
    environment.follow_move()
    assert (bin_ / "horovodrun").read_text() == f"#!{bin_}/python\nimport sys; '{old}2'\n"
    assert f"VIRTUAL_ENV={quoted.format(environment.folder)}" in (bin_ / "activate").read_text()
    assert old.encode() in (bin_ / "cmake").read_bytes()
    assert "old" not in (environment.folder / "pyvenv.cfg").read_text()


def test_an_environment_seen_through_a_link_has_not_moved(environment, tmp_path, monkeypatch):
    """A home that is a link, or a clone: whoever activates by one name and sets up by the other changes nothing."""
    activate = environment.folder / "bin" / "activate"
    activate.write_text(f"VIRTUAL_ENV={environment.folder}\n")
    (tmp_path / "link").symlink_to(environment.folder)
    linked = Environment(tmp_path / "link")
    linked.follow_move()
    assert activate.read_text() == f"VIRTUAL_ENV={environment.folder}\n"
    environment.stamp.write_text(json.dumps(Setup(environment).stamp()))
    assert Setup(linked).is_current()


def test_what_lies_where_a_set_up_is_started_is_none_of_its_business(tmp_path, monkeypatch):
    """`hvdtrain setup` beside a `types.py`, a `json.py` or a folder `pip` of the user's own."""
    environment = Environment(tmp_path / "environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment.folder], check=True, timeout=120)
    for name in ("types.py", "json.py", "pip.py", "importlib.py"):
        (tmp_path / name).write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path)
    assert environment.ask("import json, types; print(json.dumps(1))") == "1"
    assert environment.version_of("pip") is None
    if sys.version_info >= (3, 11):
        environment.run("a check", "-m", "json.tool", "--help")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["before activate", "within pip"])
def test_an_environment_whose_making_was_killed_is_mended(tmp_path, killed):
    environment = Environment(tmp_path / "environment")
    packages = make_environment(environment.folder)
    assert environment.ask("import pip._internal.cli.main") is not None
    if killed == "before activate":
        (environment.folder / "bin" / "activate").unlink()
        for folder in packages.glob("pip*"):
            shutil.rmtree(folder)
    else:
        shutil.rmtree(packages / "pip" / "_internal" / "cli")
        assert environment.version_of("pip") == pip.__version__
    assert environment.ask("import pip._internal.cli.main") is None
    environment.make()
    assert (environment.folder / "bin" / "activate").exists()
    assert environment.ask("import pip._internal.cli.main; print('works')") == "works"


@pytest.mark.parametrize("changed", ["build.py", "requirements-test.txt", "setup.cfg"])
def test_a_set_up_holds_only_for_the_files_it_was_made_from(environment, tmp_path, monkeypatch, changed):
    package = tmp_path / "hvdtrain" / "install"
    package.mkdir(parents=True)
    files = {"setup.cfg": tmp_path, "build.py": package, "requirements-test.txt": package}
    for name, folder in files.items():
        (folder / name).write_text("first")
    monkeypatch.setattr(steps, "PACKAGE", package)
    setup = Setup(environment, root=tmp_path)
    assert not setup.is_current()
    environment.stamp.write_text(json.dumps(setup.stamp()))
    assert setup.is_current()
    (files[changed] / changed).write_text("second")
    assert not setup.is_current()


@pytest.mark.parametrize("change", [{"root": None}, {"only_horovod": True}, {"with_horovod": False}])
def test_another_kind_of_set_up_does_not_hold(environment, change):
    setup = Setup(environment, root=Path(hvdtrain.__file__).parents[1])
    environment.stamp.write_text(json.dumps(setup.stamp()))
    assert setup.is_current()
    assert not dataclasses.replace(setup, **change).is_current()


def test_what_a_set_up_installs(environment, tmp_path, monkeypatch):
    monkeypatch.delenv("HVDTRAIN_WITHOUT_HOROVOD", raising=False)
    asked = parse(["--environment", str(environment.folder), "--only-horovod", "--wheel-dir", "wheels"])
    assert (asked.parts, asked.wheel_dir) == (("horovod",), Path.cwd() / "wheels")
    assert asked.imports == ["torch", "horovod.torch", "mpi4py"]
    assert Setup(environment).parts == ("horovod",)  # the rest came by pip
    assert Setup(environment, root=tmp_path).parts == ("horovod", "hvdtrain", "test")
    monkeypatch.setenv("HVDTRAIN_WITHOUT_HOROVOD", "1")
    assert "horovod.torch" not in parse(["--environment", str(environment.folder)]).imports


def test_the_systems_python_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    with pytest.raises(SetupError, match="belongs to no virtual environment"):
        parse([])


def test_what_a_launcher_left_does_not_reach_the_check(monkeypatch):
    for name in ("HOROVOD_CONTROLLER", "HOROVOD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    environ = plain_environ()
    assert not [name for name in environ if name.startswith(("HOROVOD_", "OMPI_COMM", "PMI_"))]
    assert environ["OMPI_ALLOW_RUN_AS_ROOT"] == "1"


def test_a_set_up_starts_with_a_bare_python():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import hvdtrain.install.__main__, hvdtrain.install.build"
    command = [sys.executable, "-I", "-S", "-c", code, Path(hvdtrain.__file__).parents[1]]  # -S: no site-packages
    assert subprocess.run(command, check=False, timeout=120).returncode == 0


@pytest.mark.parametrize(("words", "says"), [(["--version"], "hvdtrain 0"), (["setup", "--help"], "--only-horovod")])
def test_the_command_line_needs_nothing_installed(words, says):
    """`pip install --no-deps hvdtrain && hvdtrain setup --only-horovod`: no rich, no numpy, no torch."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hvdtrain.cli import main; sys.exit(main(sys.argv[2:]))"
    command = [sys.executable, "-I", "-S", "-c", code, Path(hvdtrain.__file__).parents[1], *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_a_set_up_goes_on_where_nobody_reads_it():
    """`launch/setup.sh | head -1`, and `>&-`."""
    code = "import sys; from hvdtrain.install.environment import say; say('1'); say('2'); print('end', file=sys.stderr)"
    command = [sys.executable, "-c", code]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "end\n")
    closed = ["sh", "-c", '"$@" >&-', "sh", *command]
    done = subprocess.run(closed, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "end\n")


def test_a_torchvision_of_the_users_own_must_import(environment):
    """As of `pip install hvdtrain[vision]`; what a set-up cannot mend it says, with the one that fits."""
    packages.declare_operators(environment)  # none is installed
    asked = 'case "$*" in *m.version*) echo 2.13.0;; *) echo "ImportError: other" >&2; exit 1;; esac'
    script(environment.python, asked)
    with pytest.raises(SetupError, match=r"torchvision 2\.13\.0 does not import beside torch 2\.13\.0.*\n.*==0\.28\.0"):
        packages.declare_operators(environment)
    assert {"torchvision", "transformers"} <= {*Setup(environment).imports}
    before = Setup(environment).stamp()
    script(environment.python, 'case "$*" in *m.version*torchvision) echo 0.28.0;; *) echo 2.13.0;; esac')
    changed = {name for name, value in Setup(environment).stamp().items() if value != before[name]}
    assert changed == {"torchvision"}  # installed later, it is looked at in the next set-up


@pytest.mark.slow
def test_pip_installs_into_the_environment_whatever_its_settings_say(tmp_path, monkeypatch):
    """A pip.conf with `user = true` is the rule at some sites, PIP_TARGET is set by some modules."""
    environment = Environment(tmp_path / "environment")
    make_environment(environment.folder)
    wheel = tmp_path / "one-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one.py", "")
        archive.writestr("one-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: one\nVersion: 1.0\n")
        archive.writestr("one-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("one-1.0.dist-info/RECORD", "")
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n[global]\nrequire-virtualenv = true\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    for name in ("PIP_USER", "PIP_REQUIRE_VIRTUALENV"):
        monkeypatch.setenv(name, "1")
    install_into_environments()
    environment.pip("installing one", "install", "--no-index", "--no-deps", str(wheel))
    assert environment.version_of("one") == "1.0"
