// Causal attention as every device's kernels are asked for it. The mathematics are in chargpt/kernels/ops/attention.py.

#pragma once

#include <cstdint>

#include "dtype.h"

namespace chargpt {

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

struct AttentionShape {
  int64_t B, H, H_kv;  // query head h reads key and value head h / (H / H_kv); H is a multiple of H_kv, H_kv ≥ 1
  int64_t T, S;        // queries and keys, S ≥ T; query i sits at position S - T + i and sees keys up to there
  int64_t D;           // channels, 1 ≤ D ≤ kMaxHeadSize
};
inline constexpr int64_t kMaxHeadSize = 256;

struct AttentionOptions {
  double scale = 1.0;      // factor on q·k
  int64_t window = 0;      // each query sees only its last `window` keys, itself included; 0: all
  bool dropout = false;    // the fields below count only where this is true
  double dropout_p = 0.0;  // in [0, 1), a multiple of 2^-16
  uint64_t seed = 0;       // the int64 seed of philox.dropout_keep_mask, reinterpreted
  const int64_t* device_seed = nullptr;  // where the seed is instead, if it lies on a GPU
};

}  // namespace chargpt
