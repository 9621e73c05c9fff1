// Causal attention on the CPU, forward and backward: what a caller needs to know. Torch-free; attention.cpp implements
// it. The mathematics, the alignment of queries with keys, and the dropout mask are those of
// chargpt/kernels/ops/attention.py. Takes float32, bfloat16 and float64.

#pragma once

#include <cstdint>

#include "../common/attention.h"
#include "parallel.h"

namespace chargpt::cpu {

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

// Name of the code path that runs for a dtype on this CPU: "amx", "avx512_bf16", "avx512", "avx2", "neon_bf16" or "plain".
// Chosen at run time, once; the environment variable CHARGPT_CPU_ISA=plain|avx2|avx512|avx512_bf16 asks for a lower one
// (for tests).
const char* attention_isa(DType dtype);

}  // namespace chargpt::cpu
