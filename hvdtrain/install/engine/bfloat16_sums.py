"""How CPUs add bfloat16: as fp32, rounded once.

A sum that travels as bfloat16 is rounded at each hop, to 8 bits: so MPI and Gloo do not add it themselves. Each rank is
sent its share of the numbers by all others, adds the parts as fp32 in the order of the ranks, scales the sum, rounds
once, and sends what it has to all: the bytes of a ring, and a result that depends on nothing but the ranks' numbers.
Minimum, maximum and product go the same way. A small tensor goes whole to all ranks, each of which does all of that.
"""

from __future__ import annotations

from hvdtrain.install.edits import Edit

_SUM = "bfloat16 could not be added"

_REDUCTION_DECLARED = """\
// A reduction of bfloat16 over the ranks: as fp32, in their order, rounded once after scaling.
class Bfloat16Reduction {
public:
  Bfloat16Reduction(ReduceOp op, double prescale, double postscale, int rank, int size)
      : op_(op), prescale_((float)prescale), postscale_((float)postscale), rank_(rank), size_(size) {}

  virtual ~Bfloat16Reduction() = default;

  // `input` may be `output`.
  void Allreduce(const void* input, void* output, int64_t count);

  // Rank r gets the next `counts[r]` numbers; `input` may be `output`.
  void Reducescatter(const void* input, void* output, const std::vector<int>& counts);

protected:
  // Parts of `sent[r]` numbers for each rank r lie one after the other, as do those of `received[r]` from it.
  virtual void Exchange(const uint16_t* input, uint16_t* output, const std::vector<int>& sent,
                        const std::vector<int>& received) = 0;

  // In place: every rank's own part of `counts[rank]` numbers is where it belongs.
  virtual void Gather(uint16_t* data, const std::vector<int>& counts) = 0;

  static std::vector<int> Offsets(const std::vector<int>& counts);

private:
  // `parts` of all ranks, `count` numbers each, one after the other.
  void Reduce(const uint16_t* parts, uint16_t* output, int64_t count) const;

  static std::vector<uint16_t>& Scratch(int64_t count);

  ReduceOp op_;
  float prescale_;
  float postscale_;
  int rank_;
  int size_;
};

class AllgatherOp : public HorovodOp {
"""

_REDUCTION_DEFINED = """\
// Bfloat16Reduction
void Bfloat16Reduction::Allreduce(const void* input, void* output, int64_t count) {
  auto* own = (const uint16_t*)input;
  auto* result = (uint16_t*)output;
  if (count * size_ <= 8192) { // the time is that of the messages, of which this takes fewer
    auto& parts = Scratch(count * size_);
    std::copy(own, own + count, parts.begin() + rank_ * count);
    Gather(parts.data(), std::vector<int>(size_, (int)count));
    Reduce(parts.data(), result, count);
    return;
  }
  std::vector<int> counts(size_, (int)(count / size_));
  for (int r = 0; r < count % size_; ++r) {
    ++counts[r];
  }
  Reducescatter(input, result + Offsets(counts)[rank_], counts);
  Gather(result, counts);
}

void Bfloat16Reduction::Reducescatter(const void* input, void* output, const std::vector<int>& counts) {
  int64_t count = counts[rank_];
  auto& parts = Scratch(count * size_);
  Exchange((const uint16_t*)input, parts.data(), counts, std::vector<int>(size_, (int)count));
  Reduce(parts.data(), (uint16_t*)output, count);
}

void Bfloat16Reduction::Reduce(const uint16_t* parts, uint16_t* output, int64_t count) const {
  constexpr int64_t BLOCK = 1024;
  float total[BLOCK];
  for (int64_t begin = 0; begin < count; begin += BLOCK) {
    int64_t length = std::min(BLOCK, count - begin);
    for (int r = 0; r < size_; ++r) {
      const uint16_t* part = parts + r * count + begin;
      auto combine = [&](auto operation) {
        for (int64_t i = 0; i < length; ++i) {
          total[i] = operation(total[i], prescale_ * Bfloat16ToFloat(part[i]));
        }
      };
      if (r == 0) {
        combine([](float, float b) { return b; });
      } else if (op_ == ReduceOp::MIN) {
        combine([](float a, float b) { return std::min(a, b); });
      } else if (op_ == ReduceOp::MAX) {
        combine([](float a, float b) { return std::max(a, b); });
      } else if (op_ == ReduceOp::PRODUCT) {
        combine([](float a, float b) { return a * b; });
      } else {
        combine([](float a, float b) { return a + b; });
      }
    }
    for (int64_t i = 0; i < length; ++i) {
      output[begin + i] = FloatToBfloat16(postscale_ * total[i]);
    }
  }
}

std::vector<int> Bfloat16Reduction::Offsets(const std::vector<int>& counts) {
  std::vector<int> offsets(counts.size(), 0);
  for (size_t r = 1; r < counts.size(); ++r) {
    offsets[r] = offsets[r - 1] + counts[r - 1];
  }
  return offsets;
}

std::vector<uint16_t>& Bfloat16Reduction::Scratch(int64_t count) {
  static thread_local std::vector<uint16_t> scratch; // the background thread's alone
  if ((int64_t)scratch.size() < count) {
    scratch.resize(count);
  }
  return scratch;
}

// Allreduce
AllreduceOp::AllreduceOp(HorovodGlobalState* global_state)
"""


def bfloat16_sum_edits() -> tuple[Edit, ...]:
    """Return what MPI and Gloo share; `bfloat16_edits` come before it."""
    header, source = "horovod/common/ops/collective_operations.h", "horovod/common/ops/collective_operations.cc"
    return (
        Edit(header, "#include <iostream>\n", "#include <algorithm>\n#include <iostream>\n#include <vector>\n", _SUM),
        Edit(header, "class AllgatherOp : public HorovodOp {\n", _REDUCTION_DECLARED, _SUM),
        Edit(
            source,
            "// Allreduce\nAllreduceOp::AllreduceOp(HorovodGlobalState* global_state)\n",
            _REDUCTION_DEFINED,
            _SUM,
        ),
        Edit(
            source,
            "  case HOROVOD_FLOAT32:\n    ScaleBufferCPUImpl(",
            "  case HOROVOD_BFLOAT16: // where MPI adds tensors of GPUs\n"
            "    std::transform((const uint16_t*)fused_input_data, (const uint16_t*)fused_input_data + num_elements,\n"
            "                   (uint16_t*)buffer_data, [scale_factor](uint16_t bits) {\n"
            "                     return FloatToBfloat16((float)scale_factor * Bfloat16ToFloat(bits));\n"
            "                   });\n"
            "    break;\n"
            "  case HOROVOD_FLOAT32:\n    ScaleBufferCPUImpl(",
            _SUM,
        ),
    )
