// Causal attention on the CPU: chooses the instruction set, divides the work, and calls attention_kernel.h, which
// explains the algorithm.

#include "attention.h"

#include "../common/philox.h"

#include <atomic>
#include <cstdlib>

#include "simd/isa.h"

namespace chargpt::cpu {
namespace {

struct ForwardCall {
  AttentionShape shape;
  AttentionOptions options;
  View q, k, v;
  MutableView out;
  void* lse;
  std::atomic<bool>* out_of_memory;
};

struct BackwardCall {
  AttentionShape shape;
  AttentionOptions options;
  View dout, q, k, v, out;
  const void *lse, *dlse;
  MutableView dq, dk, dv;
  int64_t splits;  // shares that the queries of each key head are divided into
  void* partial;   // their dk and dv, to be added up, where there are several
  std::atomic<bool>* out_of_memory;
};

struct Kernels {
  Items forward, backward, join;
  int64_t (*partial_bytes)(const AttentionShape& shape);
};

}  // namespace
}  // namespace chargpt::cpu

#define CHARGPT_KERNEL "../attention_kernel.h"
#define CHARGPT_BFLOAT16_ALONE
#include "simd/foreach_isa.h"

namespace chargpt::cpu {
namespace {

using plain::blocks_of, plain::kTile;

constexpr int64_t kEnoughItems = 16;  // of backward work to fill the threads. Not their number: see splits_of

Kernels kernels_for(DType dtype) {
#if defined(__x86_64__)
  if (dtype == DType::kBFloat16 && has_amx()) return amx::kernels(dtype);
#elif defined(CHARGPT_COMPILES_NEON_BF16)
  if (dtype == DType::kBFloat16 && has_neon_bf16()) return neon_bf16::kernels(dtype);
#endif
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      // Only bfloat16 gains from the last step.
      return dtype == DType::kBFloat16 ? avx512_bf16::kernels(dtype) : avx512::kernels(dtype);
    case Isa::kAvx512:
      return avx512::kernels(dtype);
    case Isa::kAvx2:
      return avx2::kernels(dtype);
#endif
    default:
      return plain::kernels(dtype);
  }
}

// Where there are few key heads, their queries are shared out. The number of shares depends on the shape alone, so that
// the order of additions does not depend on the number of threads.
int64_t splits_of(const AttentionShape& shape) {
  const int64_t heads = shape.B * shape.H_kv;
  const int64_t blocks = shape.H / shape.H_kv * blocks_of(shape);
  if (heads >= kEnoughItems || blocks < 2) return 1;
  const int64_t wanted = (kEnoughItems + heads - 1) / heads;
  return wanted < blocks ? wanted : blocks;
}

}  // namespace

bool attention_forward(DType dtype, const AttentionShape& shape, const AttentionOptions& options, const View& q,
                       const View& k, const View& v, const MutableView& out, void* lse, ParallelFor parallel_for) {
  std::atomic<bool> out_of_memory{false};
  ForwardCall call{shape, options, q, k, v, out, lse, &out_of_memory};
  run(parallel_for, shape.B * shape.H * ((blocks_of(shape) + 1) / 2), kernels_for(dtype).forward, &call);
  return !out_of_memory;
}

bool attention_backward(DType dtype, const AttentionShape& shape, const AttentionOptions& options, const View& dout,
                        const View& q, const View& k, const View& v, const View& out, const void* lse, const void* dlse,
                        const MutableView& dq, const MutableView& dk, const MutableView& dv, ParallelFor parallel_for) {
  if (shape.B == 0 || shape.S == 0 || shape.H == 0) return true;
  const Kernels kernels = kernels_for(dtype);
  const int64_t heads = shape.B * shape.H_kv, splits = splits_of(shape);
  std::atomic<bool> out_of_memory{false};
  BackwardCall call{shape, options, dout, q, k, v, out, lse, dlse, dq, dk, dv, splits, nullptr, &out_of_memory};
  if (splits > 1) {
    call.partial = std::aligned_alloc(64, heads * splits * kernels.partial_bytes(shape));
    if (call.partial == nullptr) return false;
  }
  run(parallel_for, heads * splits, kernels.backward, &call);
  if (splits > 1) {
    if (!out_of_memory) run(parallel_for, heads * ((shape.S + kTile - 1) / kTile), kernels.join, &call);
    std::free(call.partial);
  }
  return !out_of_memory;
}

const char* attention_isa(DType dtype) {
  if (dtype == DType::kBFloat16 && has_amx()) return "amx";
  if (dtype == DType::kBFloat16 && has_neon_bf16()) return "neon_bf16";
  const Isa isa = best_isa();
  return isa_name(isa == Isa::kAvx512Bf16 && dtype != DType::kBFloat16 ? Isa::kAvx512 : isa);
}

}  // namespace chargpt::cpu
