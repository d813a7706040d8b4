"""Time limits that Horovod's engine puts on NCCL, which nothing can interrupt: compiled as they stand, and run."""

import shutil
import socket
import subprocess
import time

import pytest

from hvdtrain.install.engine import limits
from hvdtrain.install.engine.limits import limit_edits

COMPILER = shutil.which("c++") or shutil.which("g++")
PROGRAM = """
int main(int count, char** words) {
  std::string what = words[1];
  if (what == "limit") {
    std::printf("%g\\n", StartLimit(200));
    return 0;
  }
  if (what == "said") {
    std::printf("%s\\n", HowNcclHangs(3, 4, 1, 90).c_str());
    return 0;
  }
  double seconds = std::strtod(words[2], nullptr);
  {
    EndingAfter limit(seconds, "it hangs");
    std::this_thread::sleep_for(std::chrono::milliseconds(what == "hangs" ? 60000 : 50));
  }
  std::printf("through\\n");
  return 0;
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    includes = limits._INCLUDES.replace('#include "nccl_operations.h"\n', "")
    (folder / "limits.cc").write_text(f"{includes}\n{limits.ENDING_AFTER}\n{PROGRAM}")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    command = [COMPILER, "-std=c++17", "-pthread", *warnings, "-o", str(folder / "limits"), str(folder / "limits.cc")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "limits"


def run(program, *words, **variables):
    return subprocess.run(
        [program, *words], capture_output=True, text=True, timeout=120, check=False, env={**variables, "PATH": ""}
    )


def test_what_hangs_ends_the_process_with_a_sentence(program):
    started = time.monotonic()
    done = run(program, "hangs", "0.2")
    assert (done.returncode, done.stderr, done.stdout) == (1, "hvdtrain: it hangs\n", "")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("seconds", ["20", "0", "1e300"])
def test_what_is_through_in_time_goes_on(program, seconds):
    """A limit of 0 is none."""
    done = run(program, "ends", seconds)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "through\n")


@pytest.mark.parametrize(
    ("given", "seconds"), [(None, 200), ("", 200), ("30", 30), ("0.5", 0.5), ("0", 0), ("-1", 200), ("soon", 200)]
)
def test_the_limit_is_what_the_environment_says(program, given, seconds):
    variables = {} if given is None else {"HOROVOD_NCCL_START_LIMIT": given}
    assert float(run(program, "limit", **variables).stdout) == seconds


def test_the_sentence_says_who_and_what_to_set(program):
    said = run(program, "said").stdout
    assert f"NCCL has not started within 90 s on rank 3 ({socket.gethostname()}), for 4 ranks of process set 1" in said
    assert "NCCL_SOCKET_IFNAME" in said
    assert "NCCL chooses by itself now" in said
    assert "HOROVOD_NCCL_START_LIMIT=SECONDS" in said
    assert "it is eth7 now" in run(program, "said", NCCL_SOCKET_IFNAME="eth7").stdout


def test_every_start_abort_and_end_of_a_communicator_has_one():
    """Horovod makes all of its communicators in one place, ends them in one, and aborts in one where a call fails."""
    guarded = [
        edit for edit in limit_edits() if "EndingAfter limit(" in edit.new and "class EndingAfter" not in edit.new
    ]
    assert len(guarded) == 3
    assert all(edit.path == "horovod/common/ops/nccl_operations.cc" for edit in guarded)
