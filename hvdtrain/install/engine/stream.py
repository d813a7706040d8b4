"""Stream: what waits for a result on a GPU is the stream of whoever uses it, not the host; and faults end the job.

As released, a handle is done when a host thread has seen the end of the work on the GPU, so that whoever asks for the
gradients leaves the GPU without work until then. `HOROVOD_ENABLE_ASYNC_COMPLETION` hands the event to the thread that
finishes the operation, whose stream it is that waits: in the middle of a backward pass, and no stream but the default
one. Here the event stays with the handle until somebody asks for the result: then their current stream waits for it.

Meanwhile a thread still looks at the event, and at what NCCL knows of lost peers (`faults.py`): either fault shuts
Horovod down on all ranks, where an exception used to end the process in `std::terminate`. It also keeps the zeros that
Horovod itself makes for a rank that has joined: nobody will ask for what becomes of them.

A build for CPUs has none of it: events are empty there.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit
from hvdtrain.install.engine.faults import FAULTS

_STREAM = "the host waited for the GPU wherever a result was asked for"

_HANDED_OVER = """\
  gpu_context_->RecordEvent(event_queue, "", *stream);

  auto& first_entry = entries[0];
#if HAVE_CUDA
  // Whoever asks for the result has their own stream wait for the event, which needs no thread. Not where the host has
  // a buffer in use that it keeps (Adasum), or times it.
  bool is_handed_over = global_state_->enable_async_completion && error_check_callback &&
                        free_host_buffer && !global_state_->timeline.Initialized();
#else
  bool is_handed_over = false;
#endif
"""

KEPT = """\
  // Tensors that were given back are not kept: how long they live is their owner's business. The zeros that stand for a
  // rank that has joined have no owner, and their memory would be that of the next ones while NCCL still writes to it.
  std::vector<TensorTableEntry> watched;
  for (auto& e : entries) {
    if (!is_handed_over || e.callback == nullptr) {
      watched.push_back(e);
    }
  }
"""

_WATCH = (
    """\
  int device = first_entry.device;
  if (is_handed_over) {
    Status done = Status::OK();
    done.pending = event_queue.back().second;
    done.pending.device = device;
    for (auto& e : entries) {
      e.FinishWithCallback(done);
    }
  }
"""
    + KEPT
    + """\
  gpu_context_->finalizer_thread_pool.execute(
      [watched, device, cpu_buffer, fusion_buffer, free_host_buffer,
       evt_queue, &timeline, &gpu_context, error_check_callback,
       &global_state]() mutable {
        Status status = Status::OK();
        try {
          gpu_context->SetDevice(device);
          gpu_context->WaitForEventsElastic(evt_queue, watched, timeline,
                                            error_check_callback);
        } catch (const std::exception& e) {
          LOG(ERROR, global_state->global_controller->GetRank())
              << "Horovod shuts down, since work on the GPU has failed: "
              << e.what();
          global_state->shut_down = true;
          status = Status::UnknownError(e.what());
        }

        if (free_host_buffer && cpu_buffer != nullptr) {
          free(cpu_buffer);
        }

        for (auto& e : watched) {
          timeline.End(e.tensor_name, e.output);
          try {
            e.FinishWithCallback(status);
          } catch (const std::exception& error) {
            LOG(ERROR, global_state->global_controller->GetRank())
                << "Horovod shuts down, since " << e.tensor_name
                << " cannot be finished: " << error.what();
            global_state->shut_down = true;
          }
        }
      });
"""
)

_WATCH_AS_RELEASED = """\
  bool elastic = global_state_->elastic_enabled;
  bool enable_async_completion = global_state_->enable_async_completion;
  auto current_stream = *stream;
  gpu_context_->finalizer_thread_pool.execute(
      [entries, first_entry, cpu_buffer, fusion_buffer, free_host_buffer,
       evt_queue, &timeline, &gpu_context, error_check_callback, elastic,
       enable_async_completion, current_stream, &global_state]() mutable {
        gpu_context->SetDevice(first_entry.device);

        Event event;
        bool gpu_evt_failed = false;
        std::string gpu_evt_err_msg;
        if (!enable_async_completion || timeline.Initialized()) {
          // If timeline is enabled, wait for events on CPU for accurate
          // timings.
          if (elastic) {
            try {
              gpu_context->WaitForEventsElastic(evt_queue, entries, timeline,
                                                error_check_callback);
            } catch (std::exception& e) {
              // notify background loop to exit and reinit rather than just
              // aborting the program
              global_state->shut_down = true;
              gpu_evt_failed = true;
              gpu_evt_err_msg = e.what();
            }
          } else {
            gpu_context->WaitForEvents(evt_queue, entries, timeline,
                                       error_check_callback);
          }
        } else {
          gpu_context->ClearEvents(evt_queue, entries, timeline,
                                   error_check_callback, elastic);
          event = gpu_context->RecordEvent(current_stream);
        }

        if (free_host_buffer && cpu_buffer != nullptr) {
          free(cpu_buffer);
        }

        Status status;
        if (gpu_evt_failed) {
          status = Status::UnknownError(gpu_evt_err_msg);
        } else {
          status = Status::OK();
          status.event = event;
        }

        for (auto& e : entries) {
          timeline.End(e.tensor_name, e.output);
          e.FinishWithCallback(status);
        }
        if (enable_async_completion) {
          gpu_context->ReleaseEvent(event);
        }
      });
"""

_WAIT = """\
  ThrowIfError(*status);
#if HAVE_GPU
  if (status->pending.event) {
    // An event may have been recorded anew behind a later operation of Horovod's stream: then this waits for more than
    // it must, but for nothing that was not enqueued before.
    auto stream = GetGPUStream(status->pending.device);
    HVD_GPU_CHECK(gpuStreamWaitEvent(stream, *(status->pending.event), 0));
  }
#endif
}

void Reset() {
"""


def stream_edits() -> tuple[Edit, ...]:
    """Return the changes to how work on GPUs ends; `wake_edits`, whose class Patience they use, come before them."""
    common, operations = "horovod/common", "horovod/common/ops"
    return (
        Edit(
            f"{common}/common.h",
            "  gpuStream_t stream = nullptr;\n#endif\n",
            "  gpuStream_t stream = nullptr;\n  int device = 0;\n#endif\n",
            _STREAM,
        ),
        Edit(
            f"{common}/common.h",
            "  Event event;\n\nprivate:\n",
            "  Event event;\n"
            "  // Behind the operation: the stream of whoever asks for the result waits for it.\n"
            "  Event pending;\n\nprivate:\n",
            _STREAM,
        ),
        Edit(
            f"{operations}/gpu_operations.cc",
            "  if (!global_state_->enable_async_completion) {\n"
            '    gpu_context_->RecordEvent(event_queue, "", *stream);\n'
            "  }\n\n"
            "  auto& first_entry = entries[0];\n",
            _HANDED_OVER,
            _STREAM,
        ),
        Edit(f"{operations}/gpu_operations.cc", _WATCH_AS_RELEASED, _WATCH, _STREAM),
        Edit(
            f"{operations}/gpu_operations.cc",
            '#include "gpu_operations.h"\n',
            '#include "gpu_operations.h"\n#include "../logging.h"\n',
            FAULTS,
        ),
        Edit(
            "horovod/torch/mpi_ops_v2.cc",
            "  ThrowIfError(*status);\n}\n\nvoid Reset() {\n",
            _WAIT,
            _STREAM,
        ),
        Edit(
            f"{common}/operations.cc",
            "  SetBoolFromEnv(HOROVOD_ENABLE_ASYNC_COMPLETION, state.enable_async_completion,\n"
            "                 true);\n",
            "  state.enable_async_completion =\n      GetBoolEnvOrDefault(HOROVOD_ENABLE_ASYNC_COMPLETION, true);\n",
            _STREAM,
        ),
    )
