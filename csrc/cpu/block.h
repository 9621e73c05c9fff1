// The small operators of a Transformer block on the CPU, forward and backward: what a caller needs to know. Torch-free;
// block.cpp implements them. The mathematics are those of chargpt/kernels/ops/.
//
// Each function works on the rows (or elements) [begin, end), and a row's result does not depend on the range it is in.
// Rows are contiguous; a `stride` counts elements from row to row, and outputs without one are packed. Pointers need
// the alignment of their element only. Outputs must not overlap inputs.

#pragma once

#include <cstdint>

#include "../common/attention.h"  // View, and DType

namespace chargpt::cpu {

inline constexpr double kRmsEps = 1e-6;

struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// s = x + y and s / sqrt(mean(s^2) + eps) of rows of C. Dtypes: x, y and normed alike, or x float32 and each of y and
// normed float32 or bfloat16.
struct AddRmsNorm {
  DType x_type, y_type, normed_type;
  int64_t C;     // >= 1
  Rows x, y;     // y.data == nullptr: s is x
  void* sum;     // s in the dtype of x; untouched where there is no y
  void* normed;  // of s as it was rounded
  void* rstd;    // 1 / sqrt(mean(s^2) + eps): one float for each row, or double
};
void add_rms_norm(const AddRmsNorm& call, int64_t begin, int64_t end);

// dx = dsum + rstd (dnormed - normed mean(dnormed normed)), and dy, the same number in y's dtype.
struct AddRmsNormBackward {
  DType x_type, y_type, normed_type;
  int64_t C;
  Rows sum;         // s
  const void* rstd;
  Rows dsum;        // in the dtype of x; data == nullptr: zero
  Rows dnormed;     // in the dtype of normed
  void *dx, *dy;    // dy == nullptr: not wanted
};
void add_rms_norm_backward(const AddRmsNormBackward& call, int64_t begin, int64_t end);

// The heads of packed projections; a row is a token: H heads of q, H_kv of k and H_kv of v, each of D channels.
struct QkvHeads {
  DType type, value_type;  // value_type: as type, or float32 beside bfloat16
  int64_t T;               // row r has position r % T
  int64_t H, H_kv, D;
  bool norm;               // divide each head of q and k by sqrt(mean(x^2) + eps)
  const void *cos, *sin;   // (T, D/2) packed, float or double; nullptr: q and k are not rotated
};
struct QkvHeadsForward {
  Rows qkv, value_rows;  // value_rows: (H_kv D) to each row, added to v; data == nullptr: none
  void *q, *k, *v;       // (H, D) and (H_kv, D) to each row; q and k, or v, may be nullptr: not wanted
};
void qkv_heads(const QkvHeads& heads, const QkvHeadsForward& call, int64_t begin, int64_t end);

struct QkvHeadsBackward {
  Rows qkv;         // read only with norm
  View dq, dk, dv;  // (B, heads, T, D); data == nullptr: zero
  void* dqkv;
  void* dvalue_rows;  // nullptr: not wanted
};
void qkv_heads_backward(const QkvHeads& heads, const QkvHeadsBackward& call, int64_t begin, int64_t end);

// max(x, 0)^2 and its gradient 2 max(x, 0) dy, element by element. NaN stays NaN.
void relu_squared(DType type, const void* x, void* y, int64_t begin, int64_t end);
void relu_squared_backward(DType type, const void* x, const void* dy, void* dx, int64_t begin, int64_t end);

// The code path that runs on this CPU: "avx512_bf16", "avx512", "avx2" or "plain" (see isa.h).
const char* block_isa();

}  // namespace chargpt::cpu
