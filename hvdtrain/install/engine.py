"""Changes to the engine of Horovod 0.28.1 that make it wait well: none of them changes what is computed.

As released, its background loop sleeps out a cycle of 1 ms before it looks at what was enqueued, whoever waits for a
result polls for it and takes Python's lock at each turn, and a rank that is early polls within MPI.

- **Park**: who waits for a result sleeps until it is there.
- **Wake**: what is enqueued wakes the loop. While results are outstanding the loop goes on at once, so that ranks
  cannot stay out of phase; where nothing comes of that several times in a row, it sleeps for a sixteenth of the time
  waited so far.
- **Patience**: a rank that waits for a later one in a negotiation sleeps between its looks. Waiting being cheap, an
  idle loop joins one every 10 ms instead of each 1 ms. `HOROVOD_CYCLE_TIME` is heeded as before.

With the response cache off, or process sets that come and go, ranks wait within MPI before the first patient place;
with process sets, those who are in none wait for the others' cycle too: there an idle cycle stays at 1 ms.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_PARK = "who waits for a result took Python's lock again and again instead of sleeping"
_WAKE = "what was enqueued waited for the end of a cycle"
_PATIENCE = "a rank that was early kept a core busy within MPI"

_SIGNAL_DECLARED = """\
// Wakes the background loop. One a process, never destroyed: the loop may outlive what is static.
class LoopSignal {
public:
  static LoopSignal& Get();
  void Raise();
  // Sleeps until the signal is raised, at most for `limit`; it is down afterwards.
  void Wait(std::chrono::steady_clock::duration limit);

private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_raised_ = false;
};

// The pauses of a thread that waits for other ranks: it polls at first, then sleeps ever longer.
class Patience {
public:
  void Pause();
  // A sixteenth of the time since `start`, within bounds that an operating system can keep.
  static std::chrono::steady_clock::duration
  Nap(std::chrono::steady_clock::time_point start, std::chrono::microseconds longest);

private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

class TensorQueue {
public:
  // Whether anything that was enqueued has not been started yet.
  bool HasOutstanding() const;
"""

_SIGNAL_DEFINED = """\
LoopSignal& LoopSignal::Get() {
  static auto* signal = new LoopSignal();
  return *signal;
}

void LoopSignal::Raise() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    is_raised_ = true;
  }
  changed_.notify_all();
}

void LoopSignal::Wait(std::chrono::steady_clock::duration limit) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (limit > std::chrono::steady_clock::duration::zero()) {
    changed_.wait_for(lock, limit, [this] { return is_raised_; });
  }
  is_raised_ = false;
}

void Patience::Pause() {
  if (std::chrono::steady_clock::now() - start_ < std::chrono::microseconds(30)) {
    std::this_thread::yield();
  } else {
    std::this_thread::sleep_for(Nap(start_, std::chrono::microseconds(200)));
  }
}

std::chrono::steady_clock::duration
Patience::Nap(std::chrono::steady_clock::time_point start, std::chrono::microseconds longest) {
  std::chrono::steady_clock::duration shortest = std::chrono::microseconds(5);
  auto nap = (std::chrono::steady_clock::now() - start) / 16;
  return std::min<std::chrono::steady_clock::duration>(std::max(nap, shortest), longest);
}

bool TensorQueue::HasOutstanding() const {
  std::lock_guard<std::mutex> guard(mutex_);
  return !tensor_table_.empty();
}

// Add a TensorTableEntry as well as its message to the queue.
"""

_WAIT_FOR_WORK = """\
  // What is enqueued ends the sleep. The cycle is how long an idle loop sleeps at most before it joins a negotiation.
  static auto last_progress = std::chrono::steady_clock::now();
  static int num_vain_cycles = 0;
  bool is_outstanding = false;
  for (auto id : state.process_set_table.Ids()) {
    is_outstanding |= state.process_set_table.Get(id).tensor_queue.HasOutstanding();
  }
  auto start_time = std::chrono::steady_clock::now();
  std::chrono::steady_clock::duration sleep_duration = std::chrono::steady_clock::duration::zero();
  if (!is_outstanding) {
    sleep_duration = state.last_cycle_start +
                     std::chrono::microseconds(long(state.parameter_manager.CycleTimeMs() * 1000.)) - start_time;
    last_progress = start_time;
    num_vain_cycles = 0;
  } else if (++num_vain_cycles > 2) {
    sleep_duration = Patience::Nap(last_progress, std::chrono::microseconds(1000));
  }
  LoopSignal::Get().Wait(sleep_duration);
"""

_ALL_REDUCE = """\
// As MPI_Allreduce in place; while others are late this thread sleeps between its looks, where MPI would poll.
static int AllreducePatiently(void* data, int count, MPI_Op op, MPI_Comm comm) {
  MPI_Request request;
  int code = MPI_Iallreduce(MPI_IN_PLACE, data, count, MPI_LONG_LONG_INT, op, comm, &request);
  Patience patience;
  for (int is_done = 0; code == MPI_SUCCESS;) {
    code = MPI_Test(&request, &is_done, MPI_STATUS_IGNORE);
    if (is_done) {
      break;
    }
    patience.Pause();
  }
  return code;
}

// MPIController
void MPIController::DoInitialization() {
"""


def engine_edits() -> tuple[Edit, ...]:
    """Return the changes to the engine."""
    return (*_park(), *_wake(), *_be_patient())


def _park() -> tuple[Edit, ...]:
    header, source = "horovod/torch/handle_manager.h", "horovod/torch/handle_manager.cc"
    return (
        Edit(header, "#include <atomic>\n", "#include <atomic>\n#include <condition_variable>\n", _PARK),
        Edit(
            header,
            "  bool PollHandle(int handle);\n",
            "  bool PollHandle(int handle);\n"
            "  // Sleeps until the handle is done or gone.\n"
            "  void WaitHandle(int handle);\n",
            _PARK,
        ),
        Edit(header, "  std::mutex mutex_;\n", "  std::mutex mutex_;\n  std::condition_variable changed_;\n", _PARK),
        Edit(
            source,
            "  std::lock_guard<std::mutex> guard(mutex_);\n  results_[handle] = std::make_shared<Status>(status);\n}\n",
            "  {\n"
            "    std::lock_guard<std::mutex> guard(mutex_);\n"
            "    results_[handle] = std::make_shared<Status>(status);\n"
            "  }\n"
            "  changed_.notify_all();\n"
            "}\n\n"
            "void HandleManager::WaitHandle(int handle) {\n"
            "  std::unique_lock<std::mutex> lock(mutex_);\n"
            "  changed_.wait(lock, [&] {\n"
            "    auto found = results_.find(handle);\n"
            "    return found == results_.end() || found->second != nullptr;\n"
            "  });\n"
            "}\n",
            _PARK,
        ),
        Edit(source, "  last_handle_ = 0;\n", "  last_handle_ = 0;\n  changed_.notify_all();\n", _PARK),
        Edit(
            "horovod/torch/mpi_ops_v2.cc",
            "  while (true) {\n"
            "    if (handle_manager.PollHandle(handle)) break;\n"
            "    {\n"
            "      py::gil_scoped_release release_python_gil;\n"
            "      std::this_thread::yield();\n"
            "    }\n"
            "  }\n"
            "  auto status = handle_manager.ReleaseHandle(handle);\n",
            "  if (!handle_manager.PollHandle(handle)) {\n"
            "    py::gil_scoped_release release_python_gil;\n"
            "    handle_manager.WaitHandle(handle);\n"
            "  }\n"
            "  auto status = handle_manager.ReleaseHandle(handle);\n",
            _PARK,
        ),
    )


def _wake() -> tuple[Edit, ...]:
    header, source, loop = "tensor_queue.h", "tensor_queue.cc", "operations.cc"
    folder = "horovod/common"
    return (
        Edit(
            f"{folder}/{header}",
            "#include <iostream>\n",
            "#include <chrono>\n#include <condition_variable>\n#include <iostream>\n",
            _WAKE,
        ),
        Edit(f"{folder}/{header}", "class TensorQueue {\npublic:\n", _SIGNAL_DECLARED, _WAKE),
        Edit(
            f"{folder}/{source}",
            "#include <assert.h>\n",
            "#include <assert.h>\n\n#include <algorithm>\n#include <thread>\n",
            _WAKE,
        ),
        Edit(
            f"{folder}/{source}",
            "// Add a TensorTableEntry as well as its message to the queue.\n",
            _SIGNAL_DEFINED,
            _WAKE,
        ),
        *(
            Edit(
                f"{folder}/{source}",
                f"{pushed}  return Status::OK();\n",
                f"{pushed}  LoopSignal::Get().Raise();\n  return Status::OK();\n",
                _WAKE,
            )
            for pushed in (
                "  message_queue_.push(std::move(message));\n",
                "    message_queue_.push(std::move(messages[i]));\n  }\n",
            )
        ),
        Edit(
            f"{folder}/{loop}",
            "  auto start_time = std::chrono::steady_clock::now();\n"
            "  auto sleep_duration = state.last_cycle_start +\n"
            "                        std::chrono::microseconds(long(\n"
            "                            state.parameter_manager.CycleTimeMs() * 1000.)) -\n"
            "                        start_time;\n"
            "  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {\n"
            "    std::this_thread::sleep_for(sleep_duration);\n"
            "  }\n",
            _WAIT_FOR_WORK,
            _WAKE,
        ),
        Edit(
            f"{folder}/{loop}",
            "      for (auto& response : response_list.responses()) {\n"
            "        if (!process_set.group_table.empty()) {\n",
            "      if (!response_list.responses().empty()) {\n"
            "        last_progress = std::chrono::steady_clock::now();\n"
            "        num_vain_cycles = 0;\n"
            "      }\n"
            "      for (auto& response : response_list.responses()) {\n"
            "        if (!process_set.group_table.empty()) {\n",
            _WAKE,
        ),
        Edit(
            f"{folder}/{loop}",
            "    horovod_global.shut_down = true;\n    horovod_global.background_thread.join();\n",
            "    horovod_global.shut_down = true;\n"
            "    LoopSignal::Get().Raise();\n"
            "    horovod_global.background_thread.join();\n",
            _WAKE,
        ),
    )


def _be_patient() -> tuple[Edit, ...]:
    controller, loop = "horovod/common/mpi/mpi_controller.cc", "horovod/common/operations.cc"
    return (
        Edit(controller, "// MPIController\nvoid MPIController::DoInitialization() {\n", _ALL_REDUCE, _PATIENCE),
        *(
            Edit(
                controller,
                "  int ret_code = MPI_Allreduce(MPI_IN_PLACE, bitvector.data(), count,\n"
                f"                               MPI_LONG_LONG_INT, {op}, mpi_ctx_.mpi_comm);\n",
                f"  int ret_code = AllreducePatiently(bitvector.data(), count, {op}, mpi_ctx_.mpi_comm);\n",
                _PATIENCE,
            )
            for op in ("MPI_BAND", "MPI_BOR")
        ),
        Edit(
            loop,
            "      GetBoolEnvOrDefault(HOROVOD_DYNAMIC_PROCESS_SETS, false);\n",
            "      GetBoolEnvOrDefault(HOROVOD_DYNAMIC_PROCESS_SETS, false);\n"
            "  if (horovod_cycle_time == nullptr && !enable_xla_ops && !state.dynamic_process_sets &&\n"
            "      state.process_set_ranks_to_register.empty() && state.cache_capacity > 0) {\n"
            "    state.parameter_manager.SetCycleTimeMs(10);\n"
            "  }\n",
            _PATIENCE,
        ),
        Edit(
            loop,
            "  // Set background thread affinity\n",
            "#ifdef __linux__\n"
            "  prctl(PR_SET_TIMERSLACK, 1000); // naps of microseconds; Linux adds 50 to each otherwise\n"
            "#endif\n"
            "  // Set background thread affinity\n",
            _PATIENCE,
        ),
        Edit(
            loop,
            "#include <unordered_set>\n",
            "#include <unordered_set>\n\n#ifdef __linux__\n#include <sys/prctl.h>\n#endif\n",
            _PATIENCE,
        ),
    )
