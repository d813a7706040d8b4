"""Patience: a rank that waits for a later one sleeps between its looks, and an idle one looks seldom."""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_PATIENCE = "a rank that was early kept a core busy within MPI"

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


def patience_edits() -> tuple[Edit, ...]:
    """Return the changes to the negotiation over MPI and to the length of an idle cycle."""
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
