"""How Horovod is built: the cache of wheels, and what a build must hold."""

import dataclasses
import json
import zipfile
from pathlib import Path

import pytest
from builds import GPU, RECIPE, check_lock, script

from hvdtrain.install import build
from hvdtrain.install import recipe as recipes
from hvdtrain.install.build import WheelCache
from hvdtrain.install.preflight import SetupError
from hvdtrain.install.recipe import Recipe

# The cache


@pytest.fixture
def stored(tmp_path):
    wheel = tmp_path / "horovod.whl"
    wheel.write_bytes(b"a wheel" * 1000)
    cache = WheelCache(tmp_path / "cache")
    with cache.lock("key"):
        return cache, cache.store("key", wheel)


def test_a_stored_wheel_is_found(stored):
    cache, wheel = stored
    assert cache.find("key") == wheel
    assert cache.find("other") is None
    assert [file.name for file in cache.folder.iterdir()].count("key") == 1


def test_a_truncated_wheel_is_dropped(stored):
    cache, wheel = stored
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert cache.find("key") is None
    assert not wheel.parent.exists()


def test_an_entry_without_digest_is_dropped(stored):
    cache, wheel = stored
    (wheel.parent / "sha256").unlink()
    assert cache.find("key") is None
    assert not wheel.parent.exists()


def test_a_cached_wheel_that_does_not_work_is_built_anew(stored, tmp_path, monkeypatch):
    cache, _ = stored
    cache.folder.joinpath("key").rename(cache.folder / RECIPE.key)
    new = tmp_path / "new.whl"
    new.write_bytes(b"works")

    def install_wheel(wheel: Path, recipe: Recipe) -> None:
        if wheel.read_bytes() != b"works":
            raise SetupError("broken", "build it anew")

    monkeypatch.setattr(build, "install_wheel", install_wheel)
    monkeypatch.setattr(build, "build_wheel", lambda recipe, folder: new)
    build.install(RECIPE, cache)
    found = cache.find(RECIPE.key)
    assert found is not None
    assert found.read_bytes() == b"works"


def test_a_lock_keeps_the_second_one_waiting(tmp_path):
    check_lock(lambda: WheelCache(tmp_path).lock("key"))


@pytest.mark.parametrize("home", ["unset", "a file"])
def test_without_a_home_to_write_to_the_wheel_is_not_kept(tmp_path, monkeypatch, capsys, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    if home == "unset":
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with build.open_cache() as cache:
        assert cache.folder.is_dir()
    assert not cache.folder.exists()
    assert "is not kept for the next time" in capsys.readouterr().out


def no_home():
    """What `Path.home()` raises for a user without a name, as in `docker run --user 12345`."""
    raise RuntimeError("Could not determine home directory.")


def test_the_cache_is_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with build.open_cache() as cache:
        assert cache.folder == tmp_path / "hvdtrain" / "wheels"
    assert list(cache.folder.iterdir()) == []


# What a build must hold


@pytest.fixture
def finished(tmp_path):
    """Return a function that lays out a finished build and checks it."""

    def check(torch="2.13.0+cpu", part="horovod/torch/mpi_lib_v2.cpython-311-x86_64-linux-gnu.so", standard=17):
        wheel = tmp_path / "horovod.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(part, "")
            archive.writestr("horovod/metadata.json", f'{{"pytorch": "{torch}", "dummy": "none"}}')
        for target in ("pytorch", "gloo"):
            flags = tmp_path / "build" / "temp" / f"{target}.dir" / "flags.make"
            flags.parent.mkdir(parents=True)
            flags.write_text(f"CXX_FLAGS = -std=c++11 -O3 -std=c++{standard}\n")
        build.check_wheel(wheel, tmp_path, RECIPE)

    return check


def test_a_build_as_asked_for_passes(finished):
    finished()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"torch": "2.12.0"}, "another torch"),
        ({"part": "horovod/torch/__init__.py"}, "no part for PyTorch"),
        ({"standard": 14}, r"gloo was compiled for C\+\+"),
    ],
)
def test_another_build_stops(finished, fault, message):
    with pytest.raises(SetupError, match=message):
        finished(**fault)


@pytest.mark.parametrize("fault", ["MPI", "Gloo", "NCCL"])
def test_an_installed_horovod_without_what_was_asked_for_stops(monkeypatch, fault):
    built = {"MPI": True, "Gloo": True, "NCCL": False} | {fault: fault == "NCCL"}
    monkeypatch.setattr(build, "_logged", lambda *_: None)
    monkeypatch.setattr(build, "_run_python", lambda _: json.dumps(built))
    with pytest.raises(SetupError, match="instead of"):
        build.install_wheel(Path("horovod.whl"), RECIPE)


def test_a_source_distribution_with_another_digest_is_refused(tmp_path, monkeypatch):
    sdist = tmp_path / f"horovod-{recipes.HOROVOD_VERSION}.tar.gz"
    monkeypatch.setattr(build, "_logged", lambda *_: sdist.write_bytes(b"something else"))
    with pytest.raises(SetupError, match="SHA-256 differs"):
        build.download_sdist(tmp_path)


def test_a_compiler_without_the_standard_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "old-g++", 'case "$1" in -std=c++17) exit 0;; *) exit 1;; esac')))
    build.check_compiler_standard(17)
    with pytest.raises(SetupError, match=r"old-g\+\+ cannot compile C\+\+20"):
        build.check_compiler_standard(20)


def test_all_words_of_cxx_are_the_compiler(tmp_path, monkeypatch):
    compiler = script(tmp_path / "g++", 'case "$1" in --version) echo g++ 13;; -std=c++17) exit 0;; *) exit 1;; esac')
    ccache = script(tmp_path / "ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", f"{ccache} {compiler}")
    build.check_compiler_standard(17)
    assert recipes.describe_compiler() == "g++ 13"
    with pytest.raises(SetupError, match=r"ccache .*g\+\+ cannot compile C\+\+20"):
        build.check_compiler_standard(20)


def test_nccl_gets_the_plain_name_that_its_wheel_lacks(tmp_path):
    library = tmp_path / "wheel" / "libnccl.so.2"
    library.parent.mkdir()
    library.write_text("nccl")
    gpu = dataclasses.replace(GPU, nccl_library=str(library), nccl_include=str(library.parent))
    build.link_nccl(gpu, tmp_path / "home")
    assert (tmp_path / "home" / "lib" / "libnccl.so").read_text() == "nccl"
    assert (tmp_path / "home" / "include" / "libnccl.so.2").exists()


@pytest.mark.parametrize("version", ["2.6.0", "2.13.0+cpu", "3.0.0a0"])
def test_a_torch_new_enough_is_taken(version):
    build.check_torch_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121"])
def test_a_torch_too_old_is_refused(version):
    with pytest.raises(SetupError, match=r"needs 2\.6 or newer"):
        build.check_torch_version(version)
