"""Limits: where NCCL starts, is aborted or ends, it may wait for ever, and nothing can interrupt it: the process ends.

A communicator of NCCL's is made by the first collective of its kind: of all ranks (`world/first_contact.py` makes it
early), of a process set, of a host or across hosts (the hierarchical and the torus all-reduce). Each of them is made in
one place, in the thread that does everything, which then hears of nothing else: a network that was chosen wrongly, or a
kernel that does not end on one GPU, would hang all ranks in silence. So do NCCL's ends under such a kernel.

`HOROVOD_NCCL_START_LIMIT` is the time for a start, in seconds; 0: none.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

START_LIMIT_S = 200
"""Longer than `world/first_contact.py` waits, so that its sentence comes first where both do."""
END_LIMIT_S = 60

LIMITS = "NCCL may wait for ever where it starts, is aborted or ends"

ENDING_AFTER = """\
// Ends the process, exit code 1, with a sentence, where what is done while this lives takes longer than it may.
class EndingAfter {
public:
  EndingAfter(double seconds, std::string reason) : reason_(std::move(reason)) {
    if (seconds <= 0) {
      return;
    }
    auto limit = std::chrono::milliseconds(static_cast<long long>(std::min(seconds, 1e9) * 1e3));
    try {
      thread_ = std::thread([this, limit] {
        std::unique_lock<std::mutex> lock(mutex_);
        if (!ended_.wait_for(lock, limit, [this] { return is_done_; })) {
          std::fprintf(stderr, "hvdtrain: %s\\n", reason_.c_str());
          std::fflush(stderr);
          _exit(1);
        }
      });
    } catch (const std::system_error&) { // there are no more threads: then without a limit
    }
  }

  ~EndingAfter() {
    if (thread_.joinable()) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        is_done_ = true;
      }
      ended_.notify_all();
      thread_.join();
    }
  }

  EndingAfter(const EndingAfter&) = delete;
  EndingAfter& operator=(const EndingAfter&) = delete;

private:
  std::string reason_;
  std::mutex mutex_;
  std::condition_variable ended_;
  bool is_done_ = false;
  std::thread thread_;
};

static std::string HostName() {
  char name[256] = "";
  gethostname(name, sizeof(name) - 1);
  return name;
}

// Seconds that NCCL has for a start; 0: no limit.
static double StartLimit(double usual) {
  const char* given = std::getenv("HOROVOD_NCCL_START_LIMIT");
  if (given == nullptr || *given == '\\0') {
    return usual;
  }
  char* end = nullptr;
  double seconds = std::strtod(given, &end);
  return *end == '\\0' && seconds >= 0 ? seconds : usual;
}

static std::string HowNcclHangs(int rank, int num_ranks, int process_set, double seconds) {
  const char* names = std::getenv("NCCL_SOCKET_IFNAME");
  std::ostringstream said;
  said << "NCCL has not started within " << seconds << " s on rank " << rank << " (" << HostName() << "), for "
       << num_ranks << " ranks of process set " << process_set
       << ": set NCCL_SOCKET_IFNAME to the names of the interfaces that all hosts reach each other by, as in `ip"
       << " link` ("
       << (names != nullptr && *names != '\\0' ? std::string("it is ") + names : std::string("NCCL chooses by itself"))
       << " now), and let their firewalls pass; NCCL_DEBUG=INFO says where it waits, a kernel that does not end on a"
       << " GPU keeps it waiting, too, and HOROVOD_NCCL_START_LIMIT=SECONDS gives it more time";
  return said.str();
}

"""

_INCLUDES = """\
#include "nccl_operations.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <unistd.h>
"""


def limit_edits() -> tuple[Edit, ...]:
    """Return the changes that put time limits on what of NCCL cannot be interrupted; `fault_edits` come before them."""
    file = "horovod/common/ops/nccl_operations.cc"
    return (
        Edit(file, '#include "nccl_operations.h"\n', _INCLUDES, LIMITS),
        Edit(
            file,
            "ncclDataType_t GetNCCLDataType(",
            f"{ENDING_AFTER}ncclDataType_t GetNCCLDataType(",
            LIMITS,
        ),
        Edit(
            file,
            "    ncclUniqueId nccl_id;\n",
            # To the end of the barrier behind it: where one rank is refused, the others wait for it there.
            f"    double limit_s = StartLimit({START_LIMIT_S});\n"
            "    EndingAfter limit(limit_s, HowNcclHangs(global_state_->global_controller->GetRank(), nccl_size,\n"
            "                                            process_set_id, limit_s));\n"
            "    ncclUniqueId nccl_id;\n",
            LIMITS,
        ),
        Edit(
            file,
            "    ncclCommAbort(nccl_comm);\n    nccl_comm = nullptr;",
            f'    EndingAfter limit({END_LIMIT_S}, op_name + " failed on " + HostName() + ": " +\n'
            '                          ncclGetErrorString(nccl_result) + ", and the GPU does not let NCCL end: a"\n'
            '                          " kernel on it does not end, such as one that waits for a lost rank");\n'
            "    ncclCommAbort(nccl_comm);\n    nccl_comm = nullptr;",
            LIMITS,
        ),
        Edit(
            file,
            "void NCCLContext::ShutDown() {\n",
            "void NCCLContext::ShutDown() {\n"
            f"  EndingAfter limit({END_LIMIT_S},\n"
            '                    "the GPU of a rank on " + HostName() + " does not let NCCL end: a kernel on it does"\n'
            '                    " not end, such as one that waits for a lost rank");\n',
            LIMITS,
        ),
    )
