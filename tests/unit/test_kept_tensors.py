"""Which tensors Horovod's engine keeps until a GPU is done with them: the edit, compiled as it stands, and run."""

import shutil
import subprocess

import pytest

from hvdtrain.install.engine.stream import KEPT, stream_edits

COMPILER = shutil.which("c++") or shutil.which("g++")
PROGRAM = """
#include <cstdio>
#include <functional>
#include <vector>

struct TensorTableEntry {
  int number;
  std::function<void()> callback;
};

static void Tell(const std::vector<TensorTableEntry>& entries, bool is_handed_over) {
  KEPT
  for (auto& e : watched) {
    std::printf("%d ", e.number);
  }
  std::printf("\\n");
}

int main() {
  // Asked for by this process; made for a rank that has joined; asked for.
  std::vector<TensorTableEntry> entries = {{1, [] {}}, {2, nullptr}, {3, [] {}}};
  Tell(entries, true);
  Tell(entries, false);
  return 0;
}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler here")


def test_zeros_for_a_rank_that_has_joined_are_kept_until_nccl_is_through(tmp_path):
    """Nobody else has them: their memory would be that of the next zeros, which NCCL would find sums in."""
    assert sum(KEPT in edit.new for edit in stream_edits()) == 1
    (tmp_path / "kept.cc").write_text(PROGRAM.replace("KEPT", KEPT))
    command = [COMPILER, "-std=c++17", "-Wall", "-Werror", "-o", str(tmp_path / "kept"), str(tmp_path / "kept.cc")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([tmp_path / "kept"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert [line.split() for line in said.splitlines()] == [["2"], ["1", "2", "3"]]
