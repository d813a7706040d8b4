"""Compile Horovod, edited as `launch/setup.sh` edits it, for CUDA and NCCL on a machine that has no GPU.

    python benchmarks/compile_for_gpus.py --nccl FOLDER --output benchmarks/results/compile_for_gpus.txt

A build for CPUs passes over all that is for GPUs: a mistake in an edit of it is found on the first machine that has
some. Here Horovod's own CMake says how each file is compiled with GPUs, and each is, the kernels by nvcc. `--link` goes
on to the library; with torch's build for CPUs nothing can load it, since torch's part for CUDA is missing.

Needed: a CUDA toolkit (nvcc and its headers; CUDA_HOME), and a FOLDER that has NCCL's include/nccl.h, as the wheel
nvidia-nccl-cu13 unpacked has in nvidia/nccl. Of torch the build for CPUs does, whose headers have what is for CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

from hvdtrain.install import build, preflight, recipe  # noqa: E402
from hvdtrain.install.edits import Edit  # noqa: E402
from hvdtrain.install.preflight import SetupError  # noqa: E402

# What a build of torch for CUDA says of itself, and one for CPUs does not.
OF_CUDA = Edit(
    "cmake/Modules/FindPytorch.cmake",
    'string(TOUPPER "${Pytorch_CUDA}" Pytorch_CUDA)\n',
    "set(Pytorch_CUDA TRUE)\n",
    "torch is built for CPUs here",
)
WITHOUT_EXTENSION = Edit(
    "cmake/Modules/FindPytorch.cmake",
    "if (Pytorch_CUDA OR Pytorch_ROCM)\n",
    "if (Pytorch_ROCM)\n",
    "torch is built for CPUs here",
)
MACROS = "c10/cuda/impl/cuda_cmake_macros.h"


def gpu_of(nccl: Path, capabilities: str) -> recipe.Gpu:
    """Return the toolkit and NCCL's folder; raise `SetupError` where one is missing."""
    toolkit = preflight.find_cuda(os.environ)
    if toolkit is None:
        raise SetupError("There is no CUDA toolkit (nvcc).", "export CUDA_HOME=<toolkit>")
    if not (nccl / "include" / "nccl.h").is_file():
        raise SetupError(
            f"There is no {nccl}/include/nccl.h.", "unpack the wheel nvidia-nccl-cu13, and give nvidia/nccl"
        )
    libraries = [*sorted((nccl / "lib").glob("libnccl.so*")), nccl / "lib" / "libnccl.so"]
    return recipe.Gpu(*toolkit, str(nccl / "include"), str(libraries[0]), capabilities)


def sources(folder: Path, asked: recipe.Recipe) -> Path:
    """Return the folder of Horovod's edited sources, ready to be configured with this torch as one for CUDA."""
    source = build.unpack_sdist(build.download_sdist(folder), folder)
    edits = [*asked.edits()]
    if not asked.torch.cuda:
        edits += [OF_CUDA, WITHOUT_EXTENSION]
    for edit in edits:
        edit.apply(source)
    return source


def environment(folder: Path, asked: recipe.Recipe) -> dict[str, str]:
    """Return the build's environment."""
    assert asked.gpu is not None
    build.link_nccl(asked.gpu, folder / "nccl")
    if not Path(asked.gpu.nccl_library).exists():  # the headers alone: what CMake looks for need only be there
        (folder / "nccl" / "lib" / "libnccl.so").unlink()
        (folder / "nccl" / "lib" / "libnccl.so").touch()
    variables = asked.environment(os.environ, recipe.available_cores(), folder / "nccl")
    missing = folder / "missing"
    if not (Path(asked.torch.folder) / "include" / MACROS).is_file():
        (missing / MACROS).parent.mkdir(parents=True)
        (missing / MACROS).write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    return {**variables, "CXXFLAGS": f"{variables.get('CXXFLAGS', '')} -isystem {missing}".strip()}


def configure(source: Path, tree: Path, variables: Mapping[str, str]) -> list[dict[str, str]]:
    """Return how CMake compiles each of Horovod's own files."""
    command = ["cmake", "-S", source, "-B", tree, "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
    command += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", f"-DPYTHON_EXECUTABLE={sys.executable}"]
    command += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY{of}={tree}/lib" for of in ("", "_RELWITHDEBINFO", "_ROOT")]
    (tree / "lib").mkdir(parents=True)
    said = run(command, tree, variables)
    if said:
        raise SetupError(said, "read it")
    found = json.loads((tree / "compile_commands.json").read_text())
    return [item for item in found if "third_party" not in Path(item["file"]).relative_to(source).parts]


def run(command: Sequence[object], folder: Path, variables: Mapping[str, str]) -> str:
    """Run a command; returns the end of what it said where it failed, else nothing."""
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=dict(variables), capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-6000:] or f"exit code {done.returncode}"


def words_of(item: Mapping[str, str]) -> list[str]:
    """Return the command for one file: of C++ nothing is written, which takes half the time and finds the same."""
    words = shlex.split(item["command"])
    return words if item["file"].endswith(".cu") else [*words, "-fsyntax-only"]


def main() -> None:
    """Compile, and write what came of it; the exit code is 1 where a file does not compile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nccl", type=Path, required=True, help="folder that has include/nccl.h")
    parser.add_argument("--capabilities", default="80,90", help="of the GPUs that kernels are compiled for")
    parser.add_argument("--only", default="", help="files whose names have this text")
    parser.add_argument("--link", action="store_true", help="build the library, too")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    started = time.monotonic()
    own = build.detect_recipe()
    asked = dataclasses.replace(own, gpu=own.gpu or gpu_of(given.nccl.resolve(), given.capabilities))
    assert asked.gpu is not None
    with tempfile.TemporaryDirectory(prefix="hvdtrain-compile-") as name:
        folder = Path(name)
        variables, source = environment(folder, asked), sources(folder, asked)
        files = [item for item in configure(source, folder / "tree", variables) if given.only in item["file"]]
        with ThreadPoolExecutor(recipe.available_cores()) as pool:
            said = list(pool.map(lambda item: run(words_of(item), Path(item["directory"]), variables), files))
        if given.link:
            jobs = str(recipe.available_cores())  # else make begins with all files at once
            said.append(run(["cmake", "--build", folder / "tree", "--parallel", jobs], folder, variables))
        edited = {edit.path for edit in asked.edits()}
        names = [str(Path(item["file"]).relative_to(source)) for item in files] + ["the library"] * given.link
    lines = [machine.describe(), f"toolkit:  CUDA {asked.gpu.cuda_version}, {nccl_version(asked.gpu)}, {own.compiler}"]
    lines += [
        "",
        *(
            f"{'edited ' if n in edited else '       '}{n:55} {'FAILED' if s else 'ok'}"
            for n, s in zip(names, said, strict=True)
        ),
    ]
    lines += ["", f"{len(said) - sum(map(bool, said))} of {len(said)} compile, {time.monotonic() - started:.0f} s"]
    print("\n".join([*lines, *(f"\n== {n}\n{s}" for n, s in zip(names, said, strict=True) if s)]))
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")
    sys.exit(any(said))


def nccl_version(gpu: recipe.Gpu) -> str:
    """Return what its header says."""
    text = (Path(gpu.nccl_include) / "nccl.h").read_text()
    numbers = [
        text.partition(f"#define NCCL_{part} ")[2].split("\n", 1)[0].strip() for part in ("MAJOR", "MINOR", "PATCH")
    ]
    return f"NCCL {'.'.join(numbers)}"


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
