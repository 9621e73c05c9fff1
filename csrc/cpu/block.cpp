// The small operators of a block: chooses the instruction set and calls block_kernel.h, which explains the algorithms.

#include "block.h"

#include "simd/isa.h"

namespace chargpt::cpu {
namespace {

struct BlockKernels {
  void (*add_rms_norm)(const AddRmsNorm&, int64_t, int64_t);
  void (*add_rms_norm_backward)(const AddRmsNormBackward&, int64_t, int64_t);
  void (*qkv_heads)(const QkvHeads&, const QkvHeadsForward&, int64_t, int64_t);
  void (*qkv_heads_backward)(const QkvHeads&, const QkvHeadsBackward&, int64_t, int64_t);
  void (*relu_squared)(DType, const void*, void*, int64_t, int64_t);
  void (*relu_squared_backward)(DType, const void*, const void*, void*, int64_t, int64_t);
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

void add_rms_norm(const AddRmsNorm& call, int64_t begin, int64_t end) { kernels().add_rms_norm(call, begin, end); }

void add_rms_norm_backward(const AddRmsNormBackward& call, int64_t begin, int64_t end) {
  kernels().add_rms_norm_backward(call, begin, end);
}

void qkv_heads(const QkvHeads& heads, const QkvHeadsForward& call, int64_t begin, int64_t end) {
  kernels().qkv_heads(heads, call, begin, end);
}

void qkv_heads_backward(const QkvHeads& heads, const QkvHeadsBackward& call, int64_t begin, int64_t end) {
  kernels().qkv_heads_backward(heads, call, begin, end);
}

void relu_squared(DType type, const void* x, void* y, int64_t begin, int64_t end) {
  kernels().relu_squared(type, x, y, begin, end);
}

void relu_squared_backward(DType type, const void* x, const void* dy, void* dx, int64_t begin, int64_t end) {
  kernels().relu_squared_backward(type, x, dy, dx, begin, end);
}

const char* block_isa() { return isa_name(best_isa()); }

}  // namespace chargpt::cpu
