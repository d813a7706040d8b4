"""How Horovod is built: the edits, the C++ standard, MPI, GPU, the cache, and what a build must hold."""

import dataclasses
import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import build_horovod
import horovod_recipe
import install
import preflight
import pytest
from build_horovod import WheelCache
from horovod_recipe import Edit, Gpu, Mpi, Recipe, Torch
from preflight import SetupError

CPU_TORCH = Torch("2.13.0+cpu", "", "abc", "/environment/torch")
CUDA_TORCH = Torch("2.14.1", "13.0", "abc", "/environment/torch")
GPU = Gpu("/cuda", "13.0", "/nccl/include", "/nccl/lib/libnccl.so.2", "80,90")
RECIPE = Recipe(CPU_TORCH, Mpi("wheel: 5.0.11"), None, 17, "g++ 12.2.0", ())


def script(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


# Edits


def test_an_edit_changes_the_one_match(tmp_path):
    (tmp_path / "file.cc").write_text("a; old; b;")
    Edit("file.cc", "old", "new", "why").apply(tmp_path)
    assert (tmp_path / "file.cc").read_text() == "a; new; b;"


@pytest.mark.parametrize("text", ["nothing of it", "old and old again"])
def test_an_edit_of_another_file_stops_the_build_and_changes_nothing(tmp_path, text):
    (tmp_path / "file.cc").write_text(text)
    with pytest.raises(SetupError, match=r"instead of once \(why\)"):
        Edit("file.cc", "old", "new", "why").apply(tmp_path)
    assert (tmp_path / "file.cc").read_text() == text


def test_an_edit_of_a_missing_file_stops_the_build(tmp_path):
    with pytest.raises(SetupError, match="0 times"):
        Edit("file.cc", "old", "new", "why").apply(tmp_path)


def test_both_parts_are_built_for_the_standard_of_torch():
    changed = {edit.path: edit.new for edit in dataclasses.replace(RECIPE, cxx_standard=20).edits()}
    assert "set(CMAKE_CXX_STANDARD 20)" in changed["CMakeLists.txt"]
    assert changed["horovod/torch/CMakeLists.txt"] == "set(CMAKE_CXX_STANDARD 20)"


def test_the_library_path_names_no_environment_but_the_folders_of_a_site_mpi():
    site = dataclasses.replace(RECIPE, mpi=Mpi("site", ("/opt/mpi/lib",)))
    assert '"$ORIGIN/../../torch/lib;$ORIGIN/../../../.."' in RECIPE.edits()[0].new
    assert '"$ORIGIN/../../torch/lib;$ORIGIN/../../../..;/opt/mpi/lib"' in site.edits()[0].new


# The C++ standard


def headers(folder: Path, **bounds: str) -> Path:
    names = {"aten": "ATen/ATen.h", "all": "torch/csrc/api/include/torch/all.h"}
    for name, bound in bounds.items():
        file = folder / names[name]
        file.parent.mkdir(parents=True)
        file.write_text(f"#if !defined(_MSC_VER) && __cplusplus < {bound}\n#error newer compiler, please\n#endif\n")
    return folder


@pytest.mark.parametrize(
    ("bounds", "standard"),
    [
        ({}, 14),
        ({"aten": "201402L"}, 14),
        ({"aten": "201703L", "all": "201703L"}, 17),
        ({"aten": "201703L", "all": "202002"}, 20),
    ],
)
def test_the_standard_is_the_highest_that_a_header_demands(tmp_path, bounds, standard):
    assert horovod_recipe.torch_cxx_standard(headers(tmp_path, **bounds)) == standard


def test_an_unknown_standard_stops_the_build(tmp_path):
    with pytest.raises(SetupError, match="209901"):
        horovod_recipe.torch_cxx_standard(headers(tmp_path, aten="209901L"))


def test_the_installed_torch_demands_a_standard_that_exists():
    import torch

    assert horovod_recipe.torch_cxx_standard(Path(torch.__path__[0]) / "include") in (17, 20, 23)


# The cache key and the build's environment


@pytest.mark.parametrize(
    "change",
    [
        {"torch": dataclasses.replace(CPU_TORCH, version="2.13.1+cpu")},
        {"torch": dataclasses.replace(CPU_TORCH, git="def")},
        {"mpi": Mpi("wheel: 5.0.12")},
        {"mpi": Mpi("wheel: 5.0.11", ("/opt/mpi/lib",))},
        {"gpu": GPU},
        {"gpu": dataclasses.replace(GPU, capabilities="90")},
        {"cxx_standard": 20},
        {"compiler": "g++ 13"},
        {"settings": (("CXXFLAGS", "-O3"),)},
    ],
)
def test_whatever_changes_the_build_changes_the_key(change):
    changed = dataclasses.replace(RECIPE, **change)
    keys = {RECIPE.key, changed.key}
    if "gpu" in change:
        keys |= {dataclasses.replace(RECIPE, gpu=GPU).key}
    assert len(keys) >= 2
    assert changed.key != RECIPE.key


def test_the_same_torch_in_another_folder_has_the_same_key():
    assert dataclasses.replace(RECIPE, torch=dataclasses.replace(CPU_TORCH, folder="/other")).key == RECIPE.key


def test_the_build_asks_for_mpi_gloo_and_pytorch_alone():
    base = {"HOROVOD_WITHOUT_MPI": "1", "HOROVOD_GPU_OPERATIONS": "NCCL", "PATH": "/bin", "LDFLAGS": "-L/x"}
    environment = RECIPE.environment(base, 3, Path("/nccl"))
    asked = {name for name in environment if name.startswith("HOROVOD_WITH_")}
    assert asked == {"HOROVOD_WITH_PYTORCH", "HOROVOD_WITH_MPI", "HOROVOD_WITH_GLOO"}
    assert not {"HOROVOD_WITHOUT_MPI", "HOROVOD_GPU_OPERATIONS", "HOROVOD_GPU"} & environment.keys()
    assert environment["MAKEFLAGS"] == "-j3"
    assert environment["LDFLAGS"].split() == ["-L/x", "-Wl,--strip-debug"]


def test_a_gpu_build_asks_for_nccl_and_puts_the_toolkit_first():
    recipe = dataclasses.replace(RECIPE, torch=CUDA_TORCH, gpu=GPU)
    environment = recipe.environment({"PATH": "/bin"}, 2, Path("/nccl"))
    wanted = {
        "HOROVOD_GPU": "CUDA",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_CUDA_HOME": "/cuda",
        "HOROVOD_NCCL_HOME": "/nccl",
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_BUILD_CUDA_CC_LIST": "80,90",
        "PATH": "/cuda/bin:/bin",
    }
    assert wanted.items() <= environment.items()


def test_nccl_gets_the_plain_name_that_its_wheel_lacks(tmp_path):
    library = tmp_path / "wheel" / "libnccl.so.2"
    library.parent.mkdir()
    library.write_text("nccl")
    gpu = dataclasses.replace(GPU, nccl_library=str(library), nccl_include=str(library.parent))
    build_horovod.link_nccl(gpu, tmp_path / "home")
    assert (tmp_path / "home" / "lib" / "libnccl.so").read_text() == "nccl"
    assert (tmp_path / "home" / "include" / "libnccl.so.2").exists()


def test_architecture_flags_are_spelled_out_unless_the_user_did():
    assert dict(horovod_recipe.build_settings({}, {"avx", "f16c", "sse2"})) == {
        "HOROVOD_BUILD_ARCH_FLAGS": "-mf16c -mavx"
    }
    mine = {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx2", "HOME": "/root"}
    assert dict(horovod_recipe.build_settings(mine, {"avx"})) == {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx2"}


# GPU


@pytest.fixture
def toolkit(tmp_path):
    home = tmp_path / "cuda"
    script(home / "bin" / "nvcc", "echo 'Cuda compilation tools, release 13.0, V13.0.88'")
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    return home


@pytest.fixture
def nccl(tmp_path):
    for name in ("nccl/include/nccl.h", "nccl/lib/libnccl.so.2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path / "nccl"


def test_a_cpu_torch_gets_a_cpu_build_even_beside_a_toolkit(toolkit, nccl):
    assert horovod_recipe.find_gpu(CPU_TORCH, {"CUDA_HOME": str(toolkit)}, [nccl], "90") is None


def test_a_cuda_torch_with_toolkit_and_nccl_gets_gpu_operations(toolkit, nccl, tmp_path):
    gpu = horovod_recipe.find_gpu(CUDA_TORCH, {"CUDA_HOME": str(toolkit)}, [tmp_path, nccl], "90")
    assert gpu == Gpu(str(toolkit), "13.0", str(nccl / "include"), str(nccl / "lib" / "libnccl.so.2"), "90")


def test_the_user_chooses_the_capabilities(toolkit, nccl):
    environ = {"CUDA_HOME": str(toolkit), "HOROVOD_BUILD_CUDA_CC_LIST": "86"}
    gpu = horovod_recipe.find_gpu(CUDA_TORCH, environ, [nccl], "90")
    assert gpu is not None
    assert gpu.capabilities == "86"


def test_a_cuda_torch_without_nccl_stops_the_build(toolkit, tmp_path):
    with pytest.raises(SetupError, match=r"NCCL .* nowhere"):
        horovod_recipe.find_gpu(CUDA_TORCH, {"CUDA_HOME": str(toolkit)}, [tmp_path], "90")


def test_a_toolkit_of_another_major_version_stops_the_build(toolkit, nccl):
    torch = dataclasses.replace(CUDA_TORCH, cuda="12.6")
    with pytest.raises(SetupError, match=r"is for CUDA 12\.6, and the toolkit .* is CUDA 13\.0"):
        horovod_recipe.find_gpu(torch, {"CUDA_HOME": str(toolkit)}, [nccl], "90")


def test_a_cuda_torch_without_toolkit_stops_the_build(nccl, monkeypatch):
    monkeypatch.setattr(horovod_recipe, "find_cuda", lambda _: None)
    with pytest.raises(SetupError, match="no CUDA toolkit"):
        horovod_recipe.find_gpu(CUDA_TORCH, {}, [nccl], "90")


# MPI


def fake_mpi(folder: Path) -> None:
    script(folder / "mpirun", "echo 'mpirun (Open MPI) 4.1.4'; echo more")
    script(folder / "mpicc", "echo '-L/opt/mpi/lib -L/opt/mpi/hwloc -Wl,-rpath -Wl,/opt/mpi/lib -lmpi'")


def test_the_wheel_of_the_environment_needs_no_folder(tmp_path, monkeypatch):
    fake_mpi(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert horovod_recipe.find_mpi(tmp_path) == Mpi("wheel: mpirun (Open MPI) 4.1.4")


def test_the_mpi_of_the_site_is_known_by_place_version_and_libraries(tmp_path, monkeypatch):
    fake_mpi(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    mpi = horovod_recipe.find_mpi(tmp_path / "environment" / "bin")
    assert mpi.version == f"{tmp_path / 'mpicc'}: mpirun (Open MPI) 4.1.4"
    assert mpi.library_folders == ("/opt/mpi/lib", "/opt/mpi/hwloc")


@pytest.mark.parametrize("missing", ["mpicc", "mpirun"])
def test_half_an_mpi_stops_the_build(tmp_path, monkeypatch, missing):
    fake_mpi(tmp_path)
    (tmp_path / missing).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="No MPI is on PATH"):
        horovod_recipe.find_mpi(tmp_path)


def test_only_a_whole_mpi_outside_the_environment_is_the_sites(tmp_path, monkeypatch):
    environment = install.Environment(tmp_path, tmp_path / "environment")
    own, site = environment.folder / "bin", tmp_path / "site"
    fake_mpi(own)
    monkeypatch.setenv("PATH", f"{own}:{site}")
    assert install.site_mpi(environment) is None
    script(site / "mpirun", "true")
    assert install.site_mpi(environment) is None
    script(site / "mpicc", "true")
    assert install.site_mpi(environment) == str(site)


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

    monkeypatch.setattr(build_horovod, "install_wheel", install_wheel)
    monkeypatch.setattr(build_horovod, "build_wheel", lambda recipe, folder: new)
    build_horovod.install(RECIPE, cache)
    found = cache.find(RECIPE.key)
    assert found is not None
    assert found.read_bytes() == b"works"


@pytest.mark.parametrize("place", ["cache", "environment"])
def test_a_lock_keeps_the_second_one_waiting(tmp_path, place):
    def lock():
        if place == "cache":
            return WheelCache(tmp_path).lock("key")
        return install.Environment(tmp_path, tmp_path / "environment").lock()

    entered = threading.Event()

    def second():
        with lock():
            entered.set()

    with lock():
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.2)
    thread.join(10)
    assert entered.is_set()


# What a build must hold


@pytest.fixture
def build(tmp_path):
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
        build_horovod.check_wheel(wheel, tmp_path, RECIPE)

    return check


def test_a_build_as_asked_for_passes(build):
    build()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"torch": "2.12.0"}, "another torch"),
        ({"part": "horovod/torch/__init__.py"}, "no part for PyTorch"),
        ({"standard": 14}, r"gloo was compiled for C\+\+"),
    ],
)
def test_another_build_stops(build, fault, message):
    with pytest.raises(SetupError, match=message):
        build(**fault)


@pytest.mark.parametrize("fault", ["MPI", "Gloo", "NCCL"])
def test_an_installed_horovod_without_what_was_asked_for_stops(monkeypatch, fault):
    built = {"MPI": True, "Gloo": True, "NCCL": False} | {fault: fault == "NCCL"}
    monkeypatch.setattr(build_horovod, "_logged", lambda *_: None)
    monkeypatch.setattr(build_horovod, "_run_python", lambda _: json.dumps(built))
    with pytest.raises(SetupError, match="instead of"):
        build_horovod.install_wheel(Path("horovod.whl"), RECIPE)


def test_a_source_distribution_with_another_digest_is_refused(tmp_path, monkeypatch):
    sdist = tmp_path / f"horovod-{horovod_recipe.HOROVOD_VERSION}.tar.gz"
    monkeypatch.setattr(build_horovod, "_logged", lambda *_: sdist.write_bytes(b"something else"))
    with pytest.raises(SetupError, match="SHA-256 differs"):
        build_horovod.download_sdist(tmp_path)


def test_a_compiler_without_the_standard_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "old-g++", 'case "$1" in -std=c++17) exit 0;; *) exit 1;; esac')))
    build_horovod.check_compiler_standard(17)
    with pytest.raises(SetupError, match=r"old-g\+\+ cannot compile C\+\+20"):
        build_horovod.check_compiler_standard(20)


# Versions and failures


@pytest.mark.parametrize("version", ["2.5.0", "2.13.0+cpu", "3.0.0a0"])
def test_a_torch_new_enough_is_taken(version):
    build_horovod.check_torch_version(version)


@pytest.mark.parametrize("version", ["1.13.1", "2.4.1+cu121"])
def test_a_torch_too_old_is_refused(version):
    with pytest.raises(SetupError, match=r"needs 2\.5 or newer"):
        build_horovod.check_torch_version(version)


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


def test_a_set_up_holds_only_for_the_files_it_was_made_from(tmp_path):
    root = tmp_path / "root"
    (root / "launch").mkdir(parents=True)
    for name in ("launch/install.py", "launch/requirements.txt", "setup.cfg"):
        (root / name).write_text("first")
    environment = install.Environment(root, tmp_path / "environment")
    before = install.wanted_stamp(environment)
    (root / "launch" / "requirements.txt").write_text("second")
    assert install.wanted_stamp(environment)["files"] != before["files"]
    assert not install.is_current(environment)


def test_the_scripts_need_only_the_standard_library():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import install, build_horovod"
    command = [sys.executable, "-I", "-S", "-c", code, Path(install.__file__).parent]  # -S: no site-packages
    assert subprocess.run(command, check=False, timeout=60).returncode == 0
