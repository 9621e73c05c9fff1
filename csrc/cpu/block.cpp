// The small operators of a block: chooses the instruction set and calls block_kernel.h, which explains the algorithms.

#include "block.h"

#include "simd/isa.h"

namespace chargpt::cpu {
namespace {

struct BlockKernels {
  void (*add_norm)(const AddNorm&, int64_t, int64_t);
  void (*add_norm_backward)(const AddNormBackward&, int64_t, int64_t);
  void (*qkv_heads)(const QkvHeads&, const QkvHeadsForward&, int64_t, int64_t);
  void (*qkv_heads_backward)(const QkvHeads&, const QkvHeadsBackward&, int64_t, int64_t);
  void (*activation)(const ActivationCall&, int64_t, int64_t);
  void (*activation_backward)(const ActivationCall&, int64_t, int64_t);
};

}  // namespace
}  // namespace chargpt::cpu

#define CHARGPT_KERNEL "../block_kernel.h"
#include "simd/foreach_isa.h"

namespace chargpt::cpu {
namespace {

const BlockKernels& kernels() {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::kBlockKernels;
    case Isa::kAvx512:
      return avx512::kBlockKernels;
    case Isa::kAvx2:
      return avx2::kBlockKernels;
#endif
    default:
      return plain::kBlockKernels;
  }
}

}  // namespace

void add_norm(const AddNorm& call, int64_t begin, int64_t end) { kernels().add_norm(call, begin, end); }

void add_norm_backward(const AddNormBackward& call, int64_t begin, int64_t end) {
  kernels().add_norm_backward(call, begin, end);
}

void qkv_heads(const QkvHeads& heads, const QkvHeadsForward& call, int64_t begin, int64_t end) {
  kernels().qkv_heads(heads, call, begin, end);
}

void qkv_heads_backward(const QkvHeads& heads, const QkvHeadsBackward& call, int64_t begin, int64_t end) {
  kernels().qkv_heads_backward(heads, call, begin, end);
}

void activation(const ActivationCall& call, int64_t begin, int64_t end) { kernels().activation(call, begin, end); }

void activation_backward(const ActivationCall& call, int64_t begin, int64_t end) {
  kernels().activation_backward(call, begin, end);
}

const char* block_isa() { return isa_name(best_isa()); }

}  // namespace chargpt::cpu
