"""The scripts in launch/, as a user runs them: what they say when something is missing, and what they leave behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest
from builds import make_environment
from patience import wait_for
from planted import can_make_namespaces

from hvdtrain.install.__main__ import parse
from hvdtrain.install.environment import Environment
from hvdtrain.install.steps import install_hvdtrain

pytestmark = pytest.mark.beside

needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="this user may not make mount namespaces (unshare --mount --uts)"
)
ROOT = Path(__file__).parents[2]
# All that setup.sh may rely on, besides what a test takes away.
TOOLS = ("bash", "dirname", "id", "make", "c++", "g++", "uname")
PYTHON = str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")


def check_out(root):
    """Copy what a set-up reads to `root`, without an environment."""
    shutil.copytree(ROOT / "launch", root / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "hvdtrain", root / "hvdtrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py"):
        shutil.copy(ROOT / name, root / name)
    return root


@pytest.fixture
def checkout(tmp_path):
    return check_out(tmp_path / "checkout")


@pytest.fixture
def tools(tmp_path):
    """A folder of links to the few programs that a bare machine has, Python among them."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS:
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    (folder / "python3").symlink_to(PYTHON)
    return folder


def set_up(checkout, tools, **variables):
    keep = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    environment = {**keep, "PATH": str(tools), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    command = [str(tools / "bash"), str(checkout / "launch" / "setup.sh")]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )


def assert_told(done, what, mend):
    assert done.returncode == 2, done
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 2, done.stderr
    assert re.search(what, lines[0])
    assert re.match(rf"To mend it: .*{mend}", lines[1])


def test_without_a_compiler(checkout, tools):
    for name in ("c++", "g++", "clang++"):
        (tools / name).unlink(missing_ok=True)
    assert_told(set_up(checkout, tools), r"No C\+\+ compiler is on PATH", "conda install -c conda-forge gxx")
    assert not (checkout / ".venv").exists()


def test_the_command_that_mends_is_that_of_this_machine(checkout, tools):
    for name in ("c++", "g++"):
        (tools / name).unlink(missing_ok=True)
    (tools / "apt-get").symlink_to("/bin/sh")
    assert_told(set_up(checkout, tools), r"No C\+\+ compiler", r"sudo apt-get install g\+\+")


def test_without_make(checkout, tools):
    (tools / "make").unlink()
    assert_told(set_up(checkout, tools), "`make` is not on PATH", "conda install -c conda-forge make")
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("version", ["none", "too old"])
def test_without_a_python_that_fits(checkout, tools, version):
    (tools / "python3").unlink()
    if version == "too old":
        (tools / "python3").write_text("#!/bin/sh\nexit 1\n")  # what setup.sh asks of it is whether its version fits
        (tools / "python3").chmod(0o755)
    assert_told(set_up(checkout, tools), r"No Python 3\.10 to 3\.13 is on PATH", "conda create")


def test_without_network(checkout, tools):
    for name in ("nvcc", "cmake"):
        (tools / name).symlink_to("/bin/true")
    nowhere = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
    }
    make_environment(checkout / ".venv")
    done = set_up(checkout, tools, **nowhere)
    assert_told(done, "the package index cannot be reached", "check the network")
    assert not (checkout / ".venv" / "hvdtrain-setup.json").exists()


def environment_of_this_test():
    return Path(os.environ.get("VIRTUAL_ENV") or ROOT / ".venv")


finished = pytest.mark.skipif(
    not (environment_of_this_test() / "hvdtrain-setup.json").exists(), reason="launch/setup.sh has not finished here"
)


@pytest.fixture
def current(monkeypatch):
    """The last set-up holds; anything else would be one of the environment that runs these tests, and maybe others."""
    environment = environment_of_this_test()
    monkeypatch.setenv("PATH", f"{environment / 'bin'}:{os.environ['PATH']}")
    if not parse(["--root", str(ROOT), "--environment", str(environment)]).is_current():
        pytest.skip("the last launch/setup.sh was that of another clone, or of other files: run it first")


@finished
def test_a_second_run_takes_seconds_and_changes_nothing(current):
    stamp = environment_of_this_test() / "hvdtrain-setup.json"
    before = stamp.stat().st_mtime_ns
    start = time.monotonic()
    done = subprocess.run([ROOT / "launch" / "setup.sh"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 60
    assert stamp.stat().st_mtime_ns == before


@finished
def test_what_a_set_up_installs_imports_plainly():
    """Without hvdtrain's own way to import torchvision: users' scripts do not know it."""
    command = [environment_of_this_test() / "bin" / "python", "-c", "import torchvision, transformers"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@finished
def test_local_prints_the_plain_command_and_runs_it(current):
    command = [ROOT / "launch" / "local.sh", "1", "--help"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[0] == "+ horovodrun -np 1 python -m hvdtrain --help"
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


# Stands in for `python -m hvdtrain` where local.sh is started: a rank that saves when it is asked to stop.
STOPPABLE = """
import os, pathlib, signal, sys, time
rank = os.environ["OMPI_COMM_WORLD_RANK"]
def stop(number, frame):
    time.sleep(0.5)
    pathlib.Path(f"saved-{rank}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(f"started-{rank}").write_text(str(os.getpid()))
time.sleep(60)
"""


def is_running(process_id):
    """Zombies do not count: in a container there may be no one who reaps them."""
    try:
        return b"hvdtrain" in Path("/proc", process_id, "cmdline").read_bytes()
    except FileNotFoundError:
        return False


@finished
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_lets_every_rank_save_when_it_is_asked_to_stop(tmp_path, number, current):
    (tmp_path / "hvdtrain").mkdir()
    (tmp_path / "hvdtrain" / "__init__.py").touch()
    (tmp_path / "hvdtrain" / "__main__.py").write_text(STOPPABLE)
    job = subprocess.Popen([ROOT / "launch" / "local.sh", "2"], cwd=tmp_path, stdin=subprocess.DEVNULL)
    try:
        started = [tmp_path / "started-0", tmp_path / "started-1"]

        def have_started():
            assert job.poll() is None
            return all(file.exists() and file.read_text() for file in started)

        wait_for(have_started)
        job.send_signal(number)
        assert job.wait(120) == 75
    finally:
        job.kill()
    assert sorted(file.name for file in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert not any(is_running(file.read_text()) for file in started)


@pytest.mark.parametrize(
    ("launcher", "works"),
    [("horovodrun -np 2", True), ("horovodrun --gloo -np 2", True), ("", False)],
)
def test_the_check_with_two_ranks(launcher, works):
    pytest.importorskip("horovod.torch")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.getuid() == 0 else {}
    environment = {**os.environ, **root, "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"}
    command = [*launcher.split(), sys.executable, ROOT / "hvdtrain" / "install" / "selfcheck.py"]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) is works, done.stderr
    assert ("rank 0 of 1 (2 were started)" in done.stdout + done.stderr) is not works


@pytest.fixture(scope="module")
def installed_clone(tmp_path_factory):
    """A clone named hvdtrain, installed as a set-up installs it, in an environment that has this one's packages."""
    clone = tmp_path_factory.mktemp("home") / "hvdtrain"
    for name in ("launch", "hvdtrain"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "README.md"):
        shutil.copy(ROOT / name, clone / name)
    venv = clone / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install_hvdtrain(Environment(venv), clone)
    return clone


@pytest.mark.parametrize("where", ["parent", "clone", "package", "root"])
def test_every_folder_is_good_to_start_from(installed_clone, tmp_path, where):
    """In the clone's parent, seen from which the clone is a package without code by the name of hvdtrain, too."""
    clone = installed_clone
    cwd = {"parent": clone.parent, "clone": clone, "package": clone / "hvdtrain", "root": Path("/")}[where]
    script = (clone.parent if where == "parent" else tmp_path) / "own_script.py"
    script.write_text("import hvdtrain; world = hvdtrain.init(); print(world.size, hvdtrain.__file__); world.close()")
    keep = {name: os.environ[name] for name in ("PATH", "TMPDIR", "LANG") if name in os.environ}
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    said = []
    verb = "doctor" if where == "parent" else "--version"
    for words in (["-m", "hvdtrain", verb], [str(script)]):
        done = subprocess.run(
            [clone / ".venv" / "bin" / "python", *words],
            cwd=cwd,
            env={**keep, **root, "HOME": str(clone.parent)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "Traceback" not in done.stderr
        said.append(done.stdout)
    assert re.search(r"^ok +launcher" if where == "parent" else r"^hvdtrain \d", said[0], re.MULTILINE)
    assert said[1] == f"1 {clone}/hvdtrain/__init__.py\n"


@needs_namespaces
def test_a_clone_that_cannot_be_written_is_installed_as_a_copy(installed_clone):
    """Under a read-only mount, which stops root, too."""
    clone, venv = installed_clone, installed_clone.parent / "other"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python3*/site-packages")
    (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    code = (
        "import sys; from pathlib import Path; from hvdtrain.install.environment import Environment;"
        " from hvdtrain.install.steps import install_hvdtrain;"
        " install_hvdtrain(Environment(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    script = 'mount --bind "$2" "$2" && mount -o remount,ro,bind "$2" && cd "$2" && "$3" -c "$4" "$1" "$2"'
    words = ["unshare", "--mount", "sh", "-ec", script, "sh", venv, clone, sys.executable, code]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "a copy of hvdtrain is installed" in done.stdout
    assert (packages / "hvdtrain" / "cli.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    checkout = check_out(folder / "checkout")
    (checkout / "README.md").write_text("hvdtrain")
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(checkout)], check=True, timeout=120)
    (file,) = folder.glob("hvdtrain-*.whl")
    return file


def test_a_wheel_alone_sets_up(wheel, tools, tmp_path):
    """Without a clone, and before anything else is installed; all that is missing is told at once."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (packages,) = venv.glob("lib/python3*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    for name in ("c++", "g++", "make"):
        (tools / name).unlink(missing_ok=True)
    command = [venv / "bin" / "python", "-m", "hvdtrain", "setup"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=60)
    assert_told(done, r"No C\+\+ compiler is on PATH, `make` is not on PATH", "conda-forge gxx make")


def test_the_package_installs_without_the_scripts(wheel):
    file = wheel
    with zipfile.ZipFile(file) as wheel:
        names = wheel.namelist()
        texts = {Path(name).name: wheel.read(name).decode() for name in names if ".dist-info/" in name}
    assert {"hvdtrain/__init__.py", "hvdtrain/py.typed", "hvdtrain/install/requirements-horovod.txt"} <= set(names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"hvdtrain"}
    assert "hvdtrain = hvdtrain.cli:main" in texts["entry_points.txt"]
    assert "Requires-Python: >=3.10" in texts["METADATA"]
    extras = set(re.findall(r"^Provides-Extra: (\S+)", texts["METADATA"], re.MULTILINE))
    trackers = {"mlflow", "tensorboard", "wandb"}
    features = {"data", "hf", "onnx", "report", "speech", "sweep", "translation", "vision"}
    assert extras == {"docs", "test", *features, *trackers}
