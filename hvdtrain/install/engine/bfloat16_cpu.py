"""Bfloat16 over MPI and over Gloo: all-reduce and reduce-scatter by `bfloat16_sums`, the rest as their bits."""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_SUM = "bfloat16 could not be added"

_BY_MPI = """\
// Bfloat16Reduction over MPI
class MPIBfloat16Reduction : public Bfloat16Reduction {
public:
  MPIBfloat16Reduction(ReduceOp op, double prescale, double postscale, ProcessSet& process_set)
      : Bfloat16Reduction(op, prescale, postscale, process_set.controller->GetRank(),
                          process_set.controller->GetSize()),
        comm_(process_set.mpi_context.GetMPICommunicator(Communicator::GLOBAL)) {}

protected:
  void Exchange(const uint16_t* input, uint16_t* output, const std::vector<int>& sent,
                const std::vector<int>& received) override {
    auto from = Offsets(sent), to = Offsets(received);
    int code = MPI_Alltoallv(input, sent.data(), from.data(), MPI_UINT16_T, output,
                             received.data(), to.data(), MPI_UINT16_T, comm_);
    if (code != MPI_SUCCESS) {
      throw std::runtime_error("MPI_Alltoallv failed, see MPI output for details.");
    }
  }

  void Gather(uint16_t* data, const std::vector<int>& counts) override {
    auto offsets = Offsets(counts);
    int code = MPI_Allgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, data, counts.data(),
                              offsets.data(), MPI_UINT16_T, comm_);
    if (code != MPI_SUCCESS) {
      throw std::runtime_error("MPI_Allgatherv failed, see MPI output for details.");
    }
  }

private:
  MPI_Comm comm_;
};

MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)
"""

_BY_GLOO = """\
// Bfloat16Reduction over Gloo
class GlooBfloat16Reduction : public Bfloat16Reduction {
public:
  GlooBfloat16Reduction(ReduceOp op, double prescale, double postscale, GlooContext& context)
      : Bfloat16Reduction(op, prescale, postscale, context.ctx->rank, context.ctx->size),
        algorithms_(&context) {}

protected:
  void Exchange(const uint16_t* input, uint16_t* output, const std::vector<int>& sent,
                const std::vector<int>& received) override {
    std::vector<int64_t> sends(sent.begin(), sent.end()), receives(received.begin(), received.end());
    algorithms_.Alltoall(const_cast<uint16_t*>(input), output, sends, receives);
  }

  void Gather(uint16_t* data, const std::vector<int>& counts) override {
    auto lengths = counts, offsets = Offsets(counts);
    algorithms_.Allgather(data, data, lengths.data(), offsets.data());
  }

private:
  GlooAlgorithms<uint16_t> algorithms_;
};

GlooAllreduce::GlooAllreduce(HorovodGlobalState* global_state)
"""

_SCALES = """\
  // It scales by itself, before it rounds.
  bool is_bfloat16 = first_entry.tensor->dtype() == HOROVOD_BFLOAT16;
  if (is_bfloat16) {
    prescale_factor = postscale_factor = 1.0;
  }
"""


def bfloat16_cpu_edits() -> tuple[Edit, ...]:
    """Return the changes to what MPI and Gloo do with tensors in host memory; `bfloat16_sum_edits` come before them."""
    return (*_mpi_edits(), *_gloo_edits())


def _mpi_edits() -> tuple[Edit, ...]:
    """Return the changes to what MPI does with tensors in host memory."""
    file = "horovod/common/ops/mpi_operations.cc"
    reducer = "  MPIBfloat16Reduction bfloat16(response.reduce_op(), prescale_factor, postscale_factor, process_set);\n"
    all_reduced = (
        "MPI_Allreduce(sendbuf, buffer_data, (int)num_elements,\n"
        "                    mpi_context.GetMPIDataType(first_entry.tensor),\n"
        "                    mpiOp,\n"
        "                    mpi_context.GetMPICommunicator(Communicator::GLOBAL));\n"
    )
    scattered = (
        "MPI_Reduce_scatter(\n"
        "      sendbuf != nullptr ? sendbuf : MPI_IN_PLACE, recvbuf,\n"
        "      recvcounts.data(), mpi_context.GetMPIDataType(first_entry.tensor),\n"
        "      mpi_context.GetMPISumOp(first_entry.tensor->dtype()),\n"
        "      mpi_context.GetMPICommunicator(Communicator::GLOBAL));\n"
    )
    return (
        Edit(file, "MPIAllreduce::MPIAllreduce(HorovodGlobalState* global_state)\n", _BY_MPI, _SUM),
        Edit(
            file,
            "  const void* fused_input_data;\n  void* buffer_data;\n  size_t buffer_len;\n",
            f"{reducer}{_SCALES}\n  const void* fused_input_data;\n  void* buffer_data;\n  size_t buffer_len;\n",
            _SUM,
        ),
        Edit(
            file,
            f"  int op =\n      {all_reduced}",
            "  int op = MPI_SUCCESS;\n"
            "  if (is_bfloat16) {\n"
            "    bfloat16.Allreduce(fused_input_data, buffer_data, num_elements);\n"
            "  } else {\n"
            f"    op = {all_reduced}"
            "  }\n",
            _SUM,
        ),
        Edit(
            file,
            "  void* fusion_buffer = nullptr;\n  const void* sendbuf = nullptr;\n",
            f"{reducer}{_SCALES}\n  void* fusion_buffer = nullptr;\n  const void* sendbuf = nullptr;\n",
            _SUM,
        ),
        Edit(
            file,
            f"  int op = {scattered}",
            "  int op = MPI_SUCCESS;\n"
            "  if (is_bfloat16) {\n"
            "    bfloat16.Reducescatter(sendbuf != nullptr ? sendbuf : recvbuf, recvbuf, recvcounts);\n"
            "  } else {\n"
            f"    op = {scattered}"
            "  }\n",
            _SUM,
        ),
    )


def _gloo_edits() -> tuple[Edit, ...]:
    """Return the changes to what Gloo does."""
    file = "horovod/common/ops/gloo_operations.cc"
    reducer = "  GlooBfloat16Reduction bfloat16({op}, prescale_factor, postscale_factor, gloo_context);\n"
    return (
        Edit(
            file,
            "  case HOROVOD_UINT16:\n    return new GlooAlgorithms<u_int16_t>(gloo_context);\n",
            "  case HOROVOD_UINT16:\n"
            "  case HOROVOD_BFLOAT16: // its bits; sums go by Bfloat16Reduction\n"
            "    return new GlooAlgorithms<u_int16_t>(gloo_context);\n",
            _SUM,
        ),
        Edit(file, "GlooAllreduce::GlooAllreduce(HorovodGlobalState* global_state)\n", _BY_GLOO, _SUM),
        Edit(
            file,
            "  const void* fused_input_data;\n  void* buffer_data;\n  int num_elements",
            f"{reducer.format(op='glooOp')}{_SCALES}\n"
            "  const void* fused_input_data;\n  void* buffer_data;\n  int num_elements",
            _SUM,
        ),
        Edit(
            file,
            "  gloo_algos->Allreduce(buffer_data, num_elements, glooOp);\n",
            "  if (is_bfloat16) {\n"
            "    bfloat16.Allreduce(buffer_data, buffer_data, num_elements);\n"
            "  } else {\n"
            "    gloo_algos->Allreduce(buffer_data, num_elements, glooOp);\n"
            "  }\n",
            _SUM,
        ),
        Edit(
            file,
            "  void* buffer_data = nullptr;\n  int num_elements",
            f"{reducer.format(op='ReduceOp::SUM')}{_SCALES}\n  void* buffer_data = nullptr;\n  int num_elements",
            _SUM,
        ),
        Edit(
            file,
            "  gloo_algos->Reducescatter(buffer_data, recvcounts);\n",
            "  if (is_bfloat16) {\n"
            "    bfloat16.Reducescatter(buffer_data, buffer_data, recvcounts);\n"
            "  } else {\n"
            "    gloo_algos->Reducescatter(buffer_data, recvcounts);\n"
            "  }\n",
            _SUM,
        ),
    )
