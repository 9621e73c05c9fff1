// Causal attention on the GPU, forward and backward: what a caller needs to know. Torch-free, plain C++ (no CUDA
// compiler needed to include it); attention.cu implements it. The mathematics, the alignment of queries with keys, and
// the dropout mask are those of chargpt/kernels/ops/attention.py.
//
// Takes float32, float16 and bfloat16, on sm_80 and up. float32 with D > 128 needs kWideFloat32SharedBytes of shared
// memory a block, which sm_86, sm_89 and sm_120 do not have; there the launch fails with cudaErrorInvalidValue, and
// chargpt/kernels/backends/cuda.py does not call.
// In 16-bit dtypes the backward pass takes lse to a power of 2: gradients are as right as lse · 10⁻⁷ is small, so up to
// scores of some 10⁴; larger ones stay finite.
//
// Nothing here allocates or synchronises. All pointers are device memory of the current device; work is queued on
// `stream`. What is returned is the first error of a launch, cudaSuccess otherwise.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../common/attention.h"

namespace chargpt::cuda {

// Any address and stride of a view will do; where they are multiples of 16 bytes, and D of 8 elements, copies are as
// wide.

inline constexpr int kWideFloat32SharedBytes = 135680;  // of the backward pass; the forward one takes 102912

// Fills out (B, H, T, D), of any strides, and lse (B, H, T), contiguous, natural logarithm. All elements are written;
// nothing has to be initialised. out must not overlap q, k or v. Every size of `shape` but H_kv and D may be 0.
[[nodiscard]] cudaError_t attention_forward(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                                            const View& q,  // (B, H, T, D)
                                            const View& k,  // (B, H_kv, S, D)
                                            const View& v,  // (B, H_kv, S, D)
                                            const MutableView& out, float* lse, cudaStream_t stream);

// Bytes of device memory, at a multiple of 16, that attention_backward writes intermediate results to.
[[nodiscard]] size_t attention_backward_workspace(DType dtype, const AttentionShape& shape);

// Fills dq (B, H, T, D), dk and dv (B, H_kv, S, D), each of any strides, so that they may be views of one packed
// (B, T, 3, H, D) buffer. All elements are written, those of keys that no query sees with 0. They must not overlap
// each other or the inputs. dout has any strides too, 0 included (an expanded gradient).
// dlse: (B, H, T) contiguous: the gradient that flows into lse; nullptr: none.
// workspace: attention_backward_workspace() bytes, uninitialised, free again when the stream has got this far.
// Bitwise deterministic: no atomics, and every sum has one order.
[[nodiscard]] cudaError_t attention_backward(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                                             const View& dout,  // (B, H, T, D)
                                             const View& q, const View& k, const View& v,
                                             const View& out,  // as the forward made it, any strides
                                             const float* lse, const float* dlse, const MutableView& dq,
                                             const MutableView& dk, const MutableView& dv, void* workspace,
                                             cudaStream_t stream);

}  // namespace chargpt::cuda
