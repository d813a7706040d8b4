"""What Horovod is built from: the edits, the C++ standard, MPI, GPU, the cache key."""

import dataclasses
from pathlib import Path

import pytest
from builds import CPU_TORCH, CUDA_TORCH, GPU, RECIPE, fake_mpi, script

from hvdtrain.install import recipe as recipes
from hvdtrain.install.edits import Edit
from hvdtrain.install.engine import engine_edits
from hvdtrain.install.preflight import SetupError
from hvdtrain.install.recipe import Gpu, Mpi

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


def test_the_engine_is_edited_and_in_the_key(monkeypatch):
    assert set(engine_edits()) <= set(RECIPE.edits())
    before = RECIPE.key
    monkeypatch.setattr(recipes, "engine_edits", lambda: engine_edits()[1:])
    assert RECIPE.key != before


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
    assert recipes.torch_cxx_standard(headers(tmp_path, **bounds)) == standard


def test_an_unknown_standard_stops_the_build(tmp_path):
    with pytest.raises(SetupError, match="209901"):
        recipes.torch_cxx_standard(headers(tmp_path, aten="209901L"))


def test_the_installed_torch_demands_a_standard_that_exists():
    import torch

    assert recipes.torch_cxx_standard(Path(torch.__path__[0]) / "include") in (17, 20, 23)


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


def test_architecture_flags_are_spelled_out_unless_the_user_did():
    assert dict(recipes.build_settings({}, {"avx", "f16c", "sse2"})) == {"HOROVOD_BUILD_ARCH_FLAGS": "-mf16c -mavx"}
    mine = {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx2", "HOME": "/root"}
    assert dict(recipes.build_settings(mine, {"avx"})) == {"HOROVOD_BUILD_ARCH_FLAGS": "-mavx2"}


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


def test_a_torch_for_amd_is_refused():
    """Horovod's build would look for AMD's libraries, and fail by a page of CMake."""
    with pytest.raises(SetupError, match=r"torch 2.9.1\+rocm6.4 is a build for AMD's GPUs"):
        recipes.find_gpu(dataclasses.replace(CPU_TORCH, version="2.9.1+rocm6.4"), {}, [], "90")


def test_a_cpu_torch_gets_a_cpu_build_even_beside_a_toolkit(toolkit, nccl):
    assert recipes.find_gpu(CPU_TORCH, {"CUDA_HOME": str(toolkit)}, [nccl], "90") is None


def test_a_cuda_torch_with_toolkit_and_nccl_gets_gpu_operations(toolkit, nccl, tmp_path):
    gpu = recipes.find_gpu(CUDA_TORCH, {"CUDA_HOME": str(toolkit)}, [tmp_path, nccl], "90")
    assert gpu == Gpu(str(toolkit), "13.0", str(nccl / "include"), str(nccl / "lib" / "libnccl.so.2"), "90")


def test_the_user_chooses_the_capabilities(toolkit, nccl):
    environ = {"CUDA_HOME": str(toolkit), "HOROVOD_BUILD_CUDA_CC_LIST": "86"}
    gpu = recipes.find_gpu(CUDA_TORCH, environ, [nccl], "90")
    assert gpu is not None
    assert gpu.capabilities == "86"


def test_a_cuda_torch_without_nccl_stops_the_build(toolkit, tmp_path):
    with pytest.raises(SetupError, match=r"NCCL .* nowhere"):
        recipes.find_gpu(CUDA_TORCH, {"CUDA_HOME": str(toolkit)}, [tmp_path], "90")


def test_a_toolkit_of_another_major_version_stops_the_build(toolkit, nccl):
    torch = dataclasses.replace(CUDA_TORCH, cuda="12.6")
    with pytest.raises(SetupError, match=r"is for CUDA 12\.6, and the toolkit .* is CUDA 13\.0"):
        recipes.find_gpu(torch, {"CUDA_HOME": str(toolkit)}, [nccl], "90")


def test_a_cuda_torch_without_toolkit_stops_the_build(nccl, monkeypatch):
    monkeypatch.setattr(recipes.preflight, "find_cuda", lambda _: None)
    with pytest.raises(SetupError, match="no CUDA toolkit"):
        recipes.find_gpu(CUDA_TORCH, {}, [nccl], "90")


# MPI


def test_the_wheel_of_the_environment_needs_no_folder(tmp_path, monkeypatch):
    fake_mpi(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert recipes.find_mpi(tmp_path) == Mpi("wheel: mpirun (Open MPI) 4.1.4")


def test_the_mpi_of_the_site_is_known_by_place_version_and_libraries(tmp_path, monkeypatch):
    fake_mpi(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    mpi = recipes.find_mpi(tmp_path / "environment" / "bin")
    assert mpi.version == f"{tmp_path / 'mpicc'}: mpirun (Open MPI) 4.1.4"
    assert mpi.library_folders == ("/opt/mpi/lib", "/opt/mpi/hwloc")


def test_mpich_is_known_by_name_and_version():
    said = "HYDRA build details:\n    Version:                                 4.3.2\n    CC:    gcc"
    assert recipes.describe_mpi(said) == "MPICH 4.3.2"
    assert recipes.describe_mpi("mpirun (Open MPI) 5.0.11\nmore") == "mpirun (Open MPI) 5.0.11"


@pytest.mark.parametrize("missing", ["mpicc", "mpirun"])
def test_half_an_mpi_stops_the_build(tmp_path, monkeypatch, missing):
    fake_mpi(tmp_path)
    (tmp_path / missing).unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SetupError, match="No MPI is on PATH"):
        recipes.find_mpi(tmp_path)
