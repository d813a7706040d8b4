"""Faults: wherever Horovod waits for a GPU it looks for NCCL's errors, and for its own end, and ends the job in order.

As released, most operations leave a thread that waits for the GPU and looks for errors afterwards. These had a look of
their own left to them: NCCL's all-to-all (no look at all), what goes through the host between two parts of NCCL's
(Adasum, the hierarchical all-reduce: a copy waited for the first part), the torus all-reduce (of one of its two
communicators), and waiting for the tensors that are to be sent (in the thread that does everything).

NCCL's start and its end cannot be looked at: `limits.py` ends the process where they hang.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

FAULTS = "an error on the GPU ended the process without a word, and NCCL's were not looked for"

_DRAIN = """\
void ThreadPool::drain(std::chrono::seconds limit) {
  std::unique_lock<std::mutex> lock(mutex_);
  cond_.wait_for(lock, limit, [this] { return work_queue_.empty() && num_busy_ == 0; });
}

void ThreadPool::reset() {
"""

_FIRST_PART = """\
    // The copy would wait for NCCL's part of it, without a look at NCCL's errors.
    gpu_context_->RecordEvent(gpu_op_context_.event_queue, "", *gpu_op_context_.stream);
    gpu_context_->WaitForEventsElastic(gpu_op_context_.event_queue, entries, timeline,
                                       nccl_op_context_.error_check_callback_);
"""

_HIERARCHICAL_AS_RELEASED = """\
    if (global_state_->elastic_enabled) {
      gpu_context_->WaitForEventsElastic(
          gpu_op_context_.event_queue, entries, timeline,
          nccl_op_context_.error_check_callback_);
    } else {
      gpu_context_->WaitForEvents(gpu_op_context_.event_queue, entries,
                                  timeline,
                                  nccl_op_context_.error_check_callback_);
    }
"""

_ADASUM_AS_RELEASED = """\
    if (global_state_->elastic_enabled) {
      gpu_context_->WaitForEventsElastic(gpu_op_context_.event_queue, entries,
                                         timeline, nullptr);
    } else {
      gpu_context_->WaitForEvents(gpu_op_context_.event_queue, entries,
                                  timeline, nullptr);
    }
"""

_BOTH_COMMUNICATORS = """\
  auto local_check = local_nccl_op_context_.error_check_callback_;
  auto cross_check = cross_nccl_op_context_.error_check_callback_;
  return gpu_op_context_.FinalizeGPUQueue(entries, true, [local_check, cross_check] {
    local_check();
    cross_check();
  });
"""

_READY = """\
  auto result = cudaEventQuery(cuda_event_);
  if (result == cudaErrorNotReady) {
    (void)cudaGetLastError(); // it is none
    return false;
  }
  C10_CUDA_CHECK(result);
  return true;
}
"""


def fault_edits() -> tuple[Edit, ...]:
    """Return the changes to what looks for faults, and to the end; `wake_edits` and `stream_edits` come before them."""
    return (*_watching_edits(), *_waiting_edits(), *_end_edits())


def _watching_edits() -> tuple[Edit, ...]:
    """Return what lets the thread that watches an operation's event look for NCCL's errors, whichever it is."""
    operations = "horovod/common/ops"
    return (
        Edit(
            f"{operations}/cuda_operations.cc",
            '#include "../message.h"\n',
            '#include "../message.h"\n#include "../tensor_queue.h"\n',
            FAULTS,
        ),
        Edit(
            f"{operations}/cuda_operations.cc",
            "      cudaError_t cuda_result;\n      while (true) {\n",
            "      cudaError_t cuda_result;\n      Patience patience;\n      while (true) {\n",
            FAULTS,
        ),
        Edit(
            f"{operations}/cuda_operations.cc",
            "        std::this_thread::yield();\n",
            "        patience.Pause();\n",
            FAULTS,
        ),
        Edit(
            f"{operations}/nccl_operations.cc",
            "    ncclCommAbort(nccl_comm);\n    throw std::logic_error(std::string(op_name) +\n",
            "    ncclCommAbort(nccl_comm);\n"
            "    nccl_comm = nullptr; // it is gone: the end would destroy it once more\n"
            "    throw std::logic_error(std::string(op_name) +\n",
            FAULTS,
        ),
        Edit(  # of the all-to-all; that it has no look made the host wait for the GPU, too
            f"{operations}/nccl_operations.cc",
            "  return gpu_op_context_.FinalizeGPUQueue(entries);\n",
            "  return gpu_op_context_.FinalizeGPUQueue(entries, true, nccl_op_context_.error_check_callback_);\n",
            FAULTS,
        ),
        Edit(
            f"{operations}/nccl_operations.cc",
            "  return gpu_op_context_.FinalizeGPUQueue(\n"
            "      entries, true, local_nccl_op_context_.error_check_callback_);\n",
            _BOTH_COMMUNICATORS,
            FAULTS,
        ),
        Edit(
            f"{operations}/adasum_gpu_operations.cc",
            "  return gpu_op_context_.FinalizeGPUQueue(entries, false);\n",
            "  return gpu_op_context_.FinalizeGPUQueue(entries, false, nccl_op_context_.error_check_callback_);\n",
            FAULTS,
        ),
    )


def _waiting_edits() -> tuple[Edit, ...]:
    """Return what lets Horovod's own thread look, where it waits in the midst of an operation or before one."""
    operations = "horovod/common/ops"
    return (
        Edit(f"{operations}/nccl_operations.cc", _HIERARCHICAL_AS_RELEASED, _FIRST_PART, FAULTS),
        Edit(f"{operations}/adasum_gpu_operations.cc", _ADASUM_AS_RELEASED, _FIRST_PART, FAULTS),
        Edit(
            "horovod/torch/ready_event.cc",
            "  C10_CUDA_CHECK(cudaEventSynchronize(cuda_event_));\n  return true;\n}\n",
            _READY,
            FAULTS,
        ),
        Edit(
            f"{operations}/collective_operations.cc",
            "    std::this_thread::sleep_for(std::chrono::nanoseconds(100));\n  }\n",
            "    if (global_state_->shut_down) {\n"
            '      throw std::logic_error("Horovod shuts down while data on the GPU are waited for");\n'
            "    }\n"
            "    patience.Pause();\n"
            "  }\n",
            FAULTS,
        ),
        Edit(
            f"{operations}/collective_operations.cc",
            "  while (!waiting_tensors.empty()) {\n",
            "  Patience patience;\n  while (!waiting_tensors.empty()) {\n",
            FAULTS,
        ),
        Edit(
            f"{operations}/collective_operations.cc",
            '#include "../message.h"\n',
            '#include "../message.h"\n#include "../tensor_queue.h"\n',
            FAULTS,
        ),
        Edit(
            "horovod/torch/cuda_util.cc",
            '  cudalib = dlopen("libcuda.so", RTLD_LAZY);\n',
            '  cudalib = dlopen("libcuda.so.1", RTLD_LAZY);\n',
            "the name without a number is there with a toolkit, or not at all; torch loads this one",
        ),
    )


def _end_edits() -> tuple[Edit, ...]:
    """Return what makes faults end the job in order: watchers are through before NCCL's communicators go."""
    pool = "horovod/common/thread_pool"
    return (
        Edit(
            "horovod/common/operations.cc",
            "shutdown:\n  // Finalize all contexts\n",
            "shutdown:\n"
            "#if HAVE_GPU\n"
            "  // Those that watch the GPU still ask NCCL's communicators.\n"
            "  gpu_context.finalizer_thread_pool.drain(std::chrono::seconds(10));\n"
            "#endif\n"
            "  // Finalize all contexts\n",
            FAULTS,
        ),
        Edit(
            f"{pool}.h",
            "    void execute(std::function<void(void)> f);\n",
            "    void execute(std::function<void(void)> f);\n"
            "    // Waits until nothing is left to execute, at most for `limit`.\n"
            "    void drain(std::chrono::seconds limit);\n",
            FAULTS,
        ),
        Edit(f"{pool}.h", "    bool running_;\n", "    bool running_;\n    int num_busy_ = 0;\n", FAULTS),
        Edit(
            f"{pool}.h",
            "#include <condition_variable>\n",
            "#include <chrono>\n#include <condition_variable>\n",
            FAULTS,
        ),
        Edit(f"{pool}.cc", "void ThreadPool::reset() {\n", _DRAIN, FAULTS),
        Edit(
            f"{pool}.cc",
            "    work_queue_.pop();\n    lock.unlock();\n\n    f();\n",
            "    work_queue_.pop();\n"
            "    ++num_busy_;\n"
            "    lock.unlock();\n\n"
            "    f();\n\n"
            "    lock.lock();\n"
            "    --num_busy_;\n"
            "    lock.unlock();\n"
            "    cond_.notify_all();\n",
            FAULTS,
        ),
    )
