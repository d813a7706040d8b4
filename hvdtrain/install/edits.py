"""The changes to the sources of Horovod 0.28.1: each a file, a text that occurs in it once, and why it is changed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hvdtrain.install.preflight import SetupError


@dataclass(frozen=True)
class Edit:
    """One change to a file of Horovod's source distribution: `old`, which must occur exactly once, becomes `new`."""

    path: str
    old: str
    new: str
    reason: str

    def apply(self, source: Path) -> None:
        """Change the file below `source`; raise `SetupError` if it is not the file that this edit was written for."""
        file = source / self.path
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(self.old) != 1:
            raise SetupError(
                f"{self.path} of Horovod holds {self.old!r} {text.count(self.old)} times instead of once"
                f" ({self.reason}).",
                "use Horovod 0.28.1, whose sources hvdtrain/install/edits.py was written for",
            )
        file.write_text(text.replace(self.old, self.new), encoding="utf-8")


def edits(cxx_standard: int, mpi_folders: tuple[str, ...]) -> tuple[Edit, ...]:
    """Return the changes without which Horovod 0.28.1 does not build or does not run today."""
    # Relative to horovod/torch in site-packages: torch's libraries, then the environment's lib folder. Left to
    # itself CMake writes absolute paths of the environment that happened to build the wheel.
    library_path = ";".join(("$ORIGIN/../../torch/lib", "$ORIGIN/../../../..", *mpi_folders))
    return (
        Edit(
            "CMakeLists.txt",
            "set(CMAKE_CXX_STANDARD 14)",
            f"set(CMAKE_CXX_STANDARD {cxx_standard})\n"
            "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
            f'set(CMAKE_INSTALL_RPATH "{library_path}")',
            "Gloo must be compiled for the C++ standard of torch's headers, horovod/horovod#3996;"
            " a cached wheel must find its libraries in any environment",
        ),
        Edit(
            "horovod/torch/CMakeLists.txt",
            "set(CMAKE_CXX_STANDARD 14)",
            f"set(CMAKE_CXX_STANDARD {cxx_standard})",
            "torch's headers demand it, horovod/horovod#3996",
        ),
        *_launcher_edits(),
        *_source_edits(),
    )


def _launcher_edits() -> tuple[Edit, ...]:
    """Return the changes to `horovodrun`: today's launchers, and exit codes."""
    return (
        Edit(
            "horovod/runner/mpi_run.py",
            "['-bind-to none', '-map-by slot']",
            "['--bind-to none', '--map-by slot']",
            "Open MPI 5 takes long options with two dashes only",
        ),
        Edit(
            "horovod/runner/mpi_run.py",
            "['-bind-to socket', '-map-by socket', '-rank-by core']",
            "['--bind-to socket', '--map-by socket', '--rank-by core']",
            "Open MPI 5 takes long options with two dashes only",
        ),
        Edit(
            "horovod/runner/mpi_run.py",
            "        elif 'Intel(R) MPI' in output:\n            return _IMPI_IMPL\n",
            "        elif 'Intel(R) MPI' in output:\n            return _IMPI_IMPL\n"
            "        elif 'HYDRA' in output:\n            return _MPICH_IMPL\n",
            "MPICH's mpirun calls itself HYDRA: horovodrun does not know it",
        ),
        Edit(
            "horovod/runner/launch.py",
            "        logging.basicConfig(level=logging.getLevelName(args.log_level))\n\n    _run(args)\n",
            "        logging.basicConfig(level=logging.getLevelName(args.log_level))\n\n"
            "    try:\n"
            "        _run(args)\n"
            "    except RuntimeError as error:\n"
            "        _, found, code = str(error).rpartition('Exit code: ')\n"
            "        if not found or not code.strip().isdigit():\n"
            "            raise\n"
            "        sys.exit(int(code))\n",
            "horovodrun --gloo answers a rank that ends on purpose (exit code 2 or 75) with a traceback and 1:"
            " its own exit code must be the first failing rank's",
        ),
        Edit(
            "horovod/runner/common/util/safe_shell_exec.py",
            "    # Freeze the process to prevent it from spawning any new children.\n",
            "    # A shell whose children have ended ends by itself, with their exit code.\n"
            "    for _ in range(200):\n"
            "        if alive or not p.is_running():\n"
            "            break\n"
            "        time.sleep(0.01)\n"
            "\n"
            "    # Freeze the process to prevent it from spawning any new children.\n",
            "a rank that has saved and ended with 75 on a signal to horovodrun --gloo was told as 143 now and then:"
            " its shell got a signal, too, before it had come to its own end",
        ),
    )


def _source_edits() -> tuple[Edit, ...]:
    """Return the changes to what is compiled: today's compilers, and one fault."""
    return (
        Edit(
            "horovod/common/gloo/gloo_controller.cc",
            "global_ranks_.reserve(size_);",
            "global_ranks_.resize(size_);",
            "the elements are assigned, never appended: without them the stall inspector sees no ranks",
        ),
        Edit(
            "horovod/common/group_table.h",
            "#include <mutex>\n#include <queue>\n",
            "#include <cstdint>\n#include <mutex>\n#include <queue>\n#include <string>\n",
            "GCC 13's headers do not bring std::string along",
        ),
        Edit(
            "horovod/common/common.h",
            "#include <memory>\n#include <string>\n",
            "#include <cstdint>\n#include <memory>\n#include <stdexcept>\n#include <string>\n",
            "GCC 14's headers do not bring std::logic_error along",
        ),
        Edit(
            "third_party/flatbuffers/include/flatbuffers/stl_emulation.h",
            "span &operator=(const span &other)\n"
            "      FLATBUFFERS_NOEXCEPT {\n    data_ = other.data_;\n    count_ = other.count_;\n  }",
            "span &operator=(const span &other) = delete;",
            "GCC 14 sees that it assigns to a constant; nothing calls it",
        ),
    )
