"""Park: who waits for a result sleeps until it is there."""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_PARK = "who waits for a result took Python's lock again and again instead of sleeping"


def park_edits() -> tuple[Edit, ...]:
    """Return the changes to the table of handles and to what waits for one."""
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
