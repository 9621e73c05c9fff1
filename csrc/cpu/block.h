// The small operators of a Transformer block on the CPU, forward and backward: what a caller needs to know. Torch-free;
// block.cpp implements them. The mathematics are those of chargpt/kernels/ops/.
//
// Each function works on the rows (or elements) [begin, end), and a row's result does not depend on the range it is in.
// Rows are contiguous; a `stride` counts elements from row to row, and outputs without one are packed. Pointers need
// the alignment of their element only. Outputs must not overlap inputs.

#pragma once

#include <cstdint>

#include "../common/attention.h"  // View, and DType
#include "parts.h"

namespace chargpt::cpu {

inline constexpr double kRmsEps = 1e-6, kLayerEps = 1e-5;

struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;
};

// Element i of row r survives where its 16 random bits are at least p 2^16, and is multiplied by 1 / (1 - p); others
// become 0. The bits: half i % 8 of Philox's words for the counter (i / 8, r % 2^32, r / 2^32, 0) and the key `seed`.
struct Dropout {
  bool on = false;
  double p = 0;
  uint64_t seed = 0;
};

// s = x + dropout(y) and its norm, (s - mean) rstd weight + bias, of rows of C. Dtypes: x, y and normed alike, or x
// float32 and each of y and normed float32 or bfloat16. Weight, bias, mean and rstd are float, or double beside double.
struct AddNorm {
  DType x_type, y_type, normed_type;
  Norm norm;
  Dropout dropout;            // of y
  int64_t C;                  // >= 1
  Rows x, y;                  // y.data == nullptr: s is x. x.data == nullptr, only with dropout: s is dropout(y)
  const void *weight, *bias;  // (C,); nullptr: 1 and 0; no bias without weight
  void* sum;                  // s in the dtype of x; untouched where there is no y
  void* normed;               // of s as it was rounded. It and the next two are untouched without a norm
  void *mean, *rstd;          // of each row. kRms: 0 and 1 / sqrt(mean(s^2) + eps)
};
void add_norm(const AddNorm& call, int64_t begin, int64_t end);

// Works on blocks [begin, end) of rows: a block adds up the gradients of weight and bias for its own rows.
struct AddNormBackward {
  DType x_type, y_type, normed_type;
  Norm norm;
  Dropout dropout;
  int64_t C, rows, block;  // rows of a block; the last may have fewer
  Rows sum;                // s
  Rows dsum, dnormed;      // data == nullptr: zero
  const void *weight, *mean, *rstd;
  void *dx, *dy;           // nullptr: not wanted
  void *dweight, *dbias;   // (blocks, C) in the dtype of the weight, which each wants
};
void add_norm_backward(const AddNormBackward& call, int64_t begin, int64_t end);

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

// kReluSquared: max(x, 0)^2. kGeluTanh: Hendrycks and Gimpel's approximation. kSwiglu: silu(gate) h of rows of two halves,
// (gate, h), so that y has rows of half their width. NaN stays NaN.
struct ActivationCall {  // packed
  DType type;
  Activation kind;
  int64_t width = 1;                     // of rows of y, which SwiGLU needs; begin and end count these rows, else elements
  const void *x = nullptr, *dy = nullptr;
  void *y = nullptr, *dx = nullptr;
};
void activation(const ActivationCall& call, int64_t begin, int64_t end);           // x to y
void activation_backward(const ActivationCall& call, int64_t begin, int64_t end);  // x and dy to dx

// The code path that runs on this CPU: "avx512_bf16", "avx512", "avx2" or "plain" (see isa.h).
const char* block_isa();

}  // namespace chargpt::cpu
