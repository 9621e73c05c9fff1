// Causal attention on the CPU, forward and backward: what a caller needs to know. Torch-free; attention.cpp implements
// it. The mathematics, the alignment of queries with keys, and the dropout mask are those of
// chargpt/kernels/ops/attention.py.

#pragma once

#include <cstdint>

namespace chargpt::cpu {

enum class DType { kFloat32, kBFloat16, kFloat64 };

// A tensor of shape (batch, heads, time, D) whose last dimension is contiguous. Strides count elements, and may be
// zero or negative. An element is of the DType of the call.
struct View {
  const void* data;
  int64_t batch_stride, head_stride, time_stride;
};
struct MutableView {
  void* data;
  int64_t batch_stride, head_stride, time_stride;
};

// Calls body(context, begin, end) for ranges that cover [0, count) once, at the same time or not, and returns when all
// are done. Results do not depend on the ranges. The binding gives at::parallel_for with a grain size of 1; nullptr
// means one call on this thread. `body` does not throw.
using ParallelFor = void (*)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);

struct AttentionShape {
  int64_t B, H, H_kv;  // query head h reads key and value head h / (H / H_kv); H is a multiple of H_kv, H_kv ≥ 1
  int64_t T, S;        // queries and keys, S ≥ T; query i sits at position S - T + i and sees keys up to there
  int64_t D;           // channels, 1 ≤ D ≤ kMaxHeadSize
};
inline constexpr int64_t kMaxHeadSize = 256;

struct AttentionOptions {
  double scale = 1.0;       // factor on q·k
  int64_t window = 0;       // each query sees only its last `window` keys, itself included; 0: all
  bool dropout = false;     // the two fields below count only where this is true
  double dropout_p = 0.0;   // in [0, 1)
  uint64_t seed = 0;        // the int64 seed of philox.dropout_keep_mask, reinterpreted
};

// Fills out (B, H, T, D), of any strides, and lse (B, H, T), contiguous: float32, or float64 for kFloat64; natural
// logarithm. All elements are written; nothing has to be initialised. out must not overlap q, k or v.
// For "y.transpose(1, 2).reshape(B, T, C) is free", give out the strides of a (B, T, H, D) buffer.
// Returns false when scratch memory cannot be had (a few copies of one head's k and v for each thread); the outputs
// are then undefined. Every size of `shape` but H_kv and D may be 0.
[[nodiscard]] bool attention_forward(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                                     const View& q,  // (B, H, T, D)
                                     const View& k,  // (B, H_kv, S, D)
                                     const View& v,  // (B, H_kv, S, D)
                                     const MutableView& out, void* lse, ParallelFor parallel_for);

// Fills dq (B, H, T, D), dk and dv (B, H_kv, S, D), each of any strides, so that they may be views of one packed
// (B, T, 3, H, D) buffer. All elements are written, those of keys that no query sees with 0. They must not overlap
// each other or the inputs. dout has any strides too, 0 included (an expanded gradient).
// dlse: (B, H, T) contiguous, dtype of lse: the gradient that flows into lse; nullptr: none.
// Bitwise deterministic, whatever the ranges that parallel_for makes.
[[nodiscard]] bool attention_backward(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                                      const View& dout,  // (B, H, T, D)
                                      const View& q, const View& k, const View& v,
                                      const View& out,  // as the forward made it, any strides
                                      const void* lse, const void* dlse, const MutableView& dq, const MutableView& dk,
                                      const MutableView& dv, ParallelFor parallel_for);

// Name of the code path that runs for a dtype on this CPU: "avx512_bf16", "avx512", "avx2" or "plain". Chosen at run
// time, once; the environment variable CHARGPT_CPU_ISA=plain|avx2|avx512|avx512_bf16 asks for a lower one (for tests).
const char* attention_isa(DType dtype);

}  // namespace chargpt::cpu
