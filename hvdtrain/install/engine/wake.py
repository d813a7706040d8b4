"""Wake: what is enqueued wakes the background loop, and outstanding work keeps it awake."""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_WAKE = "what was enqueued waited for the end of a cycle"

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


def wake_edits() -> tuple[Edit, ...]:
    """Return the changes to the queue of tensors and to the loop; they bring the class Patience, too."""
    return (*_queue_edits(), *_loop_edits())


def _queue_edits() -> tuple[Edit, ...]:
    """Return the changes to the queue of tensors, which wakes the loop."""
    header, source = "horovod/common/tensor_queue.h", "horovod/common/tensor_queue.cc"
    return (
        Edit(
            header,
            "#include <iostream>\n",
            "#include <chrono>\n#include <condition_variable>\n#include <iostream>\n",
            _WAKE,
        ),
        Edit(header, "class TensorQueue {\npublic:\n", _SIGNAL_DECLARED, _WAKE),
        Edit(
            source,
            "#include <assert.h>\n",
            "#include <assert.h>\n\n#include <algorithm>\n#include <thread>\n",
            _WAKE,
        ),
        Edit(
            source,
            "// Add a TensorTableEntry as well as its message to the queue.\n",
            _SIGNAL_DEFINED,
            _WAKE,
        ),
        *(
            Edit(
                source,
                f"{pushed}  return Status::OK();\n",
                f"{pushed}  LoopSignal::Get().Raise();\n  return Status::OK();\n",
                _WAKE,
            )
            for pushed in (
                "  message_queue_.push(std::move(message));\n",
                "    message_queue_.push(std::move(messages[i]));\n  }\n",
            )
        ),
    )


def _loop_edits() -> tuple[Edit, ...]:
    """Return the changes to the loop, which sleeps until it is woken."""
    loop = "horovod/common/operations.cc"
    return (
        Edit(
            loop,
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
            loop,
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
            loop,
            "    horovod_global.shut_down = true;\n    horovod_global.background_thread.join();\n",
            "    horovod_global.shut_down = true;\n"
            "    LoopSignal::Get().Raise();\n"
            "    horovod_global.background_thread.join();\n",
            _WAKE,
        ),
    )
