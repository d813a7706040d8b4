"""Bfloat16: a type of Horovod's own, from torch's tensors to the wire.

As released, Horovod knows none. `bfloat16_sums` and `bfloat16_cpu` have how CPUs add it, `bfloat16_gpu` what GPUs do.
MPI's operations here round at each hop, as those for float16 do; they are for tensors on GPUs of which a part, or all,
goes by MPI. Adasum refuses the type.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_TYPE = "bfloat16 could not be sent"

_CONVERSIONS = """\
// bfloat16 is the upper half of a float.
inline float Bfloat16ToFloat(uint16_t bits) {
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

// To the nearest, to the even one of two; what is not a number stays so.
inline uint16_t FloatToBfloat16(float value) {
  uint32_t wide;
  memcpy(&wide, &value, sizeof(wide));
  uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
  uint32_t not_a_number = (wide >> 16) | 0x40;
  return (uint16_t)((wide & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded);
}

#if HAVE_MPI
void bfloat16_sum(void* invec, void* inoutvec, int* len, MPI_Datatype* datatype);
void bfloat16_min(void* invec, void* inoutvec, int* len, MPI_Datatype* datatype);
void bfloat16_max(void* invec, void* inoutvec, int* len, MPI_Datatype* datatype);
void bfloat16_prod(void* invec, void* inoutvec, int* len, MPI_Datatype* datatype);
"""

_MPI_OPERATIONS = """\
#if HAVE_MPI
namespace {
template <typename Combine>
void CombineBfloat16(void* invec, void* inoutvec, int count, Combine combine) {
  auto* in = (uint16_t*)invec;
  auto* inout = (uint16_t*)inoutvec;
  for (int i = 0; i < count; ++i) {
    inout[i] = FloatToBfloat16(combine(Bfloat16ToFloat(inout[i]), Bfloat16ToFloat(in[i])));
  }
}
} // namespace

void bfloat16_sum(void* invec, void* inoutvec, int* len, MPI_Datatype*) {
  CombineBfloat16(invec, inoutvec, *len, [](float a, float b) { return a + b; });
}

void bfloat16_min(void* invec, void* inoutvec, int* len, MPI_Datatype*) {
  CombineBfloat16(invec, inoutvec, *len, [](float a, float b) { return std::min(a, b); });
}

void bfloat16_max(void* invec, void* inoutvec, int* len, MPI_Datatype*) {
  CombineBfloat16(invec, inoutvec, *len, [](float a, float b) { return std::max(a, b); });
}

void bfloat16_prod(void* invec, void* inoutvec, int* len, MPI_Datatype*) {
  CombineBfloat16(invec, inoutvec, *len, [](float a, float b) { return a * b; });
}

// float16 custom data type summation operation.
"""


def bfloat16_edits() -> tuple[Edit, ...]:
    """Return the changes that bring the type: messages, torch's tensors, MPI's operations."""
    return (*_type_edits(), *_mpi_edits())


def _type_edits() -> tuple[Edit, ...]:
    """Return the changes to messages and to torch's types."""
    wire, message = "horovod/common/wire/message_generated.h", "horovod/common/message"
    last = "HOROVOD_BOOL"
    return (
        Edit(f"{message}.h", "  HOROVOD_BOOL = 9,\n", "  HOROVOD_BOOL = 9,\n  HOROVOD_BFLOAT16 = 10,\n", _TYPE),
        Edit(
            f"{message}.cc",
            '      static const std::string bool_("bool");\n      return bool_;\n',
            '      static const std::string bool_("bool");\n      return bool_;\n'
            "    case HOROVOD_BFLOAT16:\n"
            '      static const std::string bfloat16("bfloat16");\n'
            "      return bfloat16;\n",
            _TYPE,
        ),
        Edit(
            f"{message}.cc",
            "    case HOROVOD_FLOAT16:\n      return 2;\n",
            "    case HOROVOD_FLOAT16:\n    case HOROVOD_BFLOAT16:\n      return 2;\n",
            _TYPE,
        ),
        # As FlatBuffers' compiler would write it.
        Edit(
            wire,
            f"  DataType_{last} = 9,\n  DataType_MIN = DataType_HOROVOD_UINT8,\n  DataType_MAX = DataType_{last}\n",
            f"  DataType_{last} = 9,\n  DataType_HOROVOD_BFLOAT16 = 10,\n"
            "  DataType_MIN = DataType_HOROVOD_UINT8,\n  DataType_MAX = DataType_HOROVOD_BFLOAT16\n",
            _TYPE,
        ),
        Edit(wire, "(&EnumValuesDataType())[10]", "(&EnumValuesDataType())[11]", _TYPE),
        Edit(wire, f"    DataType_{last}\n  }};", f"    DataType_{last},\n    DataType_HOROVOD_BFLOAT16\n  }};", _TYPE),
        Edit(
            wire,
            '  static const char * const names[11] = {\n    "HOROVOD_UINT8",\n',
            '  static const char * const names[12] = {\n    "HOROVOD_UINT8",\n',
            _TYPE,
        ),
        Edit(wire, f'    "{last}",\n', f'    "{last}",\n    "HOROVOD_BFLOAT16",\n', _TYPE),
        Edit(
            wire,
            f"IsOutRange(e, DataType_HOROVOD_UINT8, DataType_{last})",
            "IsOutRange(e, DataType_HOROVOD_UINT8, DataType_HOROVOD_BFLOAT16)",
            _TYPE,
        ),
        Edit(
            "horovod/torch/adapter_v2.cc",
            "    return ::torch::kHalf;\n",
            "    return ::torch::kHalf;\n  case common::HOROVOD_BFLOAT16:\n    return ::torch::kBFloat16;\n",
            _TYPE,
        ),
        Edit(
            "horovod/torch/adapter_v2.cc",
            "    return common::HOROVOD_FLOAT16;\n",
            "    return common::HOROVOD_FLOAT16;\n  case ::torch::kBFloat16:\n    return common::HOROVOD_BFLOAT16;\n",
            _TYPE,
        ),
        Edit("horovod/torch/mpi_ops_v2.cc", "PYBIND11_MODULE(mpi_lib_v2, m) {\n", _functions(), _TYPE),
    )


def _functions() -> str:
    """Return the head of the module for Python, with the functions for bfloat16: by their names it knows them."""
    verbs = ("allreduce", "allgather", "broadcast", "alltoall", "reducescatter")
    lines = ["PYBIND11_MODULE(mpi_lib_v2, m) {", "  // bfloat16"]
    for verb in verbs:
        own = f"Do{verb.capitalize()}"
        functions = {verb: own}
        if verb not in ("broadcast", "alltoall"):
            functions[f"grouped_{verb}"] = f"DoGrouped{verb.capitalize()}"
        for name, function in functions.items():
            lines.append(f'  m.def("horovod_torch_{name}_async_torch_BFloat16Tensor", &{function});')
            lines.append(f"#if HOROVOD_GPU_{verb.upper()}")
            lines.append(f'  m.def("horovod_torch_{name}_async_torch_cuda_BFloat16Tensor", &{function});')
            lines.append("#else")
            lines.append(f'  m.def("horovod_torch_{name}_async_torch_cuda_BFloat16Tensor", &{function}CudaOnCPU);')
            lines.append("#endif")
    return "\n".join(lines) + "\n\n"


def _mpi_edits() -> tuple[Edit, ...]:
    """Return the changes to MPI's types and operations, and to what Adasum says."""
    half, adasum = "horovod/common/half", "horovod/common/ops/adasum/adasum.h"
    return (
        Edit(f"{half}.h", "#include <stdint.h>\n", "#include <stdint.h>\n#include <string.h>\n", _TYPE),
        Edit(
            f"{half}.h",
            "#if HAVE_MPI\nvoid float16_sum(",
            f"{_CONVERSIONS}void float16_sum(",
            _TYPE,
        ),
        Edit(f"{half}.cc", "#if HAVE_MPI\n// float16 custom data type summation operation.\n", _MPI_OPERATIONS, _TYPE),
        *_mpi_context_edits(),
        Edit(
            adasum,
            '      throw std::logic_error("Unsupported data type");\n',
            '      throw std::logic_error("Adasum does not take " + DataType_Name(data_type) +\n'
            '                             ": give it float16, float32 or float64");\n',
            "it did not say which type Adasum refuses",
        ),
    )


def _mpi_context_edits() -> tuple[Edit, ...]:
    """Return the changes to what makes, hands out and frees MPI's types and operations."""
    context = "horovod/common/mpi/mpi_context"
    operations = ("sum", "min", "max", "prod")
    created = "".join(f"  MPI_Op_create(&bfloat16_{name}, 1, &mpi_bfloat16_{name});\n" for name in operations)
    freed = "".join(
        f"  if (mpi_bfloat16_{name} != MPI_OP_NULL) {{\n    MPI_Op_free(&mpi_bfloat16_{name});\n  }}\n"
        for name in operations
    )
    released = ("MPI_SUM", "MPI_MIN", "MPI_MAX", "MPI_PROD")
    return (
        Edit(
            f"{context}.h",
            "  MPI_Op mpi_float16_prod;\n",
            "  MPI_Op mpi_float16_prod;\n"
            + "".join(f"  MPI_Op mpi_bfloat16_{name} = MPI_OP_NULL;\n" for name in operations),
            _TYPE,
        ),
        # Two bytes, whatever they mean.
        Edit(
            f"{context}.cc",
            "  case HOROVOD_FLOAT16:\n    return mpi_float16_t;\n",
            "  case HOROVOD_FLOAT16:\n  case HOROVOD_BFLOAT16:\n    return mpi_float16_t;\n",
            _TYPE,
        ),
        *(
            Edit(
                f"{context}.cc",
                f"  return dtype == HOROVOD_FLOAT16 ? mpi_float16_{name} : {other};\n",
                f"  return dtype == HOROVOD_FLOAT16    ? mpi_float16_{name}\n"
                f"         : dtype == HOROVOD_BFLOAT16 ? mpi_bfloat16_{name}\n"
                f"                                     : {other};\n",
                _TYPE,
            )
            for name, other in zip(operations, released, strict=True)
        ),
        *(
            Edit(
                f"{context}.cc",
                f"{before}  CreateMPIFloat16TypeAndOps(mpi_float16_t, mpi_float16_sum, mpi_float16_min,\n",
                f"{before}{created}  CreateMPIFloat16TypeAndOps(mpi_float16_t, mpi_float16_sum, mpi_float16_min,\n",
                _TYPE,
            )
            for before in (
                "  CreateMPILocalAndCrossComm(mpi_comm, local_comm, cross_comm);\n\n",
                "    CreateMPILocalAndCrossComm(mpi_comm, local_comm, cross_comm);\n  }\n\n",
            )
        ),
        Edit(
            f"{context}.cc",
            "  if (mpi_float16_t != MPI_DATATYPE_NULL) {\n",
            f"{freed}  if (mpi_float16_t != MPI_DATATYPE_NULL) {{\n",
            _TYPE,
        ),
    )
