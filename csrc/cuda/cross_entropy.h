// Softmax cross-entropy on the GPU, loss and gradient: what a caller needs to know. Torch-free, plain C++ (no CUDA
// compiler needed to include it); cross_entropy.cu implements it. The mathematics are those of
// chargpt/kernels/ops/cross_entropy.py.
//
// Nothing here allocates or synchronises. All pointers are device memory of the current device; work is queued on
// `stream`. What is returned is the first error of a launch, cudaSuccess otherwise. The results are bitwise
// deterministic: no atomics, and every sum has one order, that of the losses the same on every GPU.
//
// A target that is neither ignore_index nor in [0, V) cannot be an error here, since nobody waits for the GPU. It reads
// nothing out of bounds and makes its row's loss and gradient NaN, and with them the sum or mean.

#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../common/cross_entropy.h"
#include "../common/dtype.h"

namespace chargpt::cuda {

struct CrossEntropy {
  DType dtype;         // of the logits and their gradient
  const void* logits;  // (N, V), 1 <= V < 2^31, each row contiguous, at any element's address
  int64_t N, V;
  int64_t row_stride;      // elements from row to row. Rows that start at a multiple of 16 bytes after one another's
                           // start, as contiguous ones do in the gradient too, are written 16 bytes at a time
  const int64_t* targets;  // (N)
  CrossEntropyOptions options;
  Reduction reduction;
};

// Bytes of device memory, at a multiple of 16, that both functions below write intermediate results to. It is free
// again when the stream has got this far.
[[nodiscard]] size_t cross_entropy_workspace(const CrossEntropy& problem);

// loss: (N) for kNone, otherwise one number.
// normalisers: (2, N): m = the largest logit of each row after softcap, then the sum of exp(x - m), so that
//     lse = m + log(sum). Unset for ignored rows.
// gradient: (N, V) contiguous: the gradient of the reduced loss, or for kNone of the sum of the losses; all rows are
//     written, those of ignored rows with 0. nullptr: not wanted. It must not overlap the logits. Computing it here reads
//     the logits once instead of twice. In float16 better leave it to the backward: the gradient of a mean over
//     thousands of rows underflows before the loss scale has multiplied it.
[[nodiscard]] cudaError_t cross_entropy_forward(const CrossEntropy& problem, float* loss, float* normalisers,
                                                void* gradient, void* workspace, cudaStream_t stream);

// Fills gradient (N, V), as above, from the logits and what the forward found, times what flows into the loss:
// loss_gradient: (N) for kNone, otherwise one number.
[[nodiscard]] cudaError_t cross_entropy_backward(const CrossEntropy& problem, const float* loss_gradient,
                                                 const float* normalisers, void* gradient, void* workspace,
                                                 cudaStream_t stream);

// gradient (count), at any element's address, times the number at `factor`, in place: for a gradient that the forward
// has computed, when the backward learns what flows into the loss. Where that is 1, nothing is read or written.
[[nodiscard]] cudaError_t cross_entropy_scale_gradient(DType dtype, void* gradient, int64_t count, const float* factor,
                                                       cudaStream_t stream);

}  // namespace chargpt::cuda
