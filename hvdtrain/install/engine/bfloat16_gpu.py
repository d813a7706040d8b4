"""Bfloat16 on GPUs: NCCL's own type, and the kernels that scale it.

NCCL adds in fp32 and rounds at each hop of its ring. AMD's GPUs have no kernels for it here: Horovod says so.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_GPU = "bfloat16 on GPUs could not be sent or scaled"

_SCALE_KERNEL = """\
// bfloat16 is scaled as fp32, which every architecture has.
__global__ void scale_buffer_bfloat16_k(const __nv_bfloat16* input, __nv_bfloat16* output, int64_t num_elements,
                                        const float scale_factor) {
  const size_t idx = static_cast<size_t>(blockDim.x) * blockIdx.x + threadIdx.x;

  for (size_t i = idx; i < num_elements; i += gridDim.x * blockDim.x) {
    output[i] = __float2bfloat16(scale_factor * __bfloat162float(input[i]));
  }
}

#define NTHREADS_SCALE_BUFFER_KERNEL 512
"""

_COPY_KERNEL = """\
// bfloat16 is scaled as fp32, which every architecture has.
template<typename TL, int blocks_per_copy>
__device__ void batched_scaled_memcpy_d(size_t idx, const __nv_bfloat16* input, __nv_bfloat16* output, size_t size,
                                        const float scale_factor) {
  const size_t num_words = size / sizeof(TL);
  const TL* read_ptr = reinterpret_cast<const TL*>(input);
  TL* write_ptr = reinterpret_cast<TL*>(output);
  for (size_t i = idx; i < num_words; i += blockDim.x * blocks_per_copy) {
    TL word = read_ptr[i];
    __nv_bfloat16* val = reinterpret_cast<__nv_bfloat16*>(&word);
    for (int j = 0; j < sizeof(TL) / sizeof(__nv_bfloat16); ++j) {
      val[j] = __float2bfloat16(scale_factor * __bfloat162float(val[j]));
    }
    write_ptr[i] = word;
  }

  size_t remainder = (size % sizeof(TL)) / sizeof(__nv_bfloat16);
  if (idx < remainder) {
    const __nv_bfloat16* input_r = reinterpret_cast<const __nv_bfloat16*>(read_ptr + num_words);
    __nv_bfloat16* output_r = reinterpret_cast<__nv_bfloat16*>(write_ptr + num_words);
    output_r[idx] = __float2bfloat16(scale_factor * __bfloat162float(input_r[idx]));
  }
}

template<typename T, int blocks_per_copy, typename TS>
__global__ void batched_scaled_memcpy_k(BatchedD2DParams params, TS scale_factor) {
"""


def bfloat16_gpu_edits() -> tuple[Edit, ...]:
    """Return the changes to NCCL's types and to CUDA's kernels; `bfloat16_edits` come before them."""
    kernels = "horovod/common/ops/cuda/cuda_kernels.cu"
    return (
        Edit(
            "horovod/common/ops/nccl_operations.cc",
            "  case HOROVOD_FLOAT16:\n    return ncclFloat16;\n",
            "  case HOROVOD_FLOAT16:\n    return ncclFloat16;\n"
            "#if NCCL_VERSION_CODE >= 21003\n"
            "  case HOROVOD_BFLOAT16:\n    return ncclBfloat16;\n"
            "#endif\n",
            _GPU,
        ),
        Edit(kernels, "#include <cuda_fp16.h>\n", "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n", _GPU),
        Edit(kernels, "#define NTHREADS_SCALE_BUFFER_KERNEL 512\n", _SCALE_KERNEL, _GPU),
        Edit(
            kernels,
            "template<typename T, int blocks_per_copy, typename TS>\n"
            "__global__ void batched_scaled_memcpy_k(BatchedD2DParams params, TS scale_factor) {\n",
            _COPY_KERNEL,
            _GPU,
        ),
        Edit(
            kernels,
            "    case HOROVOD_FLOAT32:\n      scale_buffer_k<<<",
            "    case HOROVOD_BFLOAT16:\n"
            "      scale_buffer_bfloat16_k<<<blocks, threads, 0, stream>>>(\n"
            "          (const __nv_bfloat16*) fused_input_data, (__nv_bfloat16*) buffer_data, num_elements,\n"
            "          (float) scale_factor);\n"
            "      break;\n"
            "    case HOROVOD_FLOAT32:\n      scale_buffer_k<<<",
            _GPU,
        ),
        Edit(
            kernels,
            "   case HOROVOD_FLOAT32:\n     batched_scaled_memcpy_k<float,",
            "   case HOROVOD_BFLOAT16:\n"
            "     batched_scaled_memcpy_k<__nv_bfloat16, BLOCKS_PER_COPY_D2D_KERNEL>\n"
            "         <<<blocks, threads, 0, stream>>>(params, (float) scale_factor);\n"
            "     break;\n"
            "   case HOROVOD_FLOAT32:\n     batched_scaled_memcpy_k<float,",
            _GPU,
        ),
    )
