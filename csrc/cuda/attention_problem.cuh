// What the attention kernels of all dtypes share: the problem in 32-bit numbers, who sees whom, rows of a head.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "attention.h"
#include "launch.cuh"
#include "philox.cuh"

namespace chargpt::cuda {

// Shared memory that one block can have: sm_80; and sm_86, sm_89 and sm_120, the least of all chips from sm_80 on.
inline constexpr int kSharedBytesSm80 = 163 << 10, kSharedBytesSm86 = 99 << 10;

inline constexpr int kRun = 8;  // channels that float32 products, and delta, add up one after the other

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

struct Problem {
  int batches, heads, heads_kv, group;  // `group` query heads share a key head
  int T, S, D;
  int window;  // each query sees its last `window` keys; S where there is no limit
  float scale, scale_log2;  // the factor on q·k, for exponents of e and of 2
  Dropout dropout;
  bool vectors;  // all rows that are read start at multiples of 16 bytes and consist of whole ones
  bool pairs;    // elements may be written in twos

  // Query i sits at this position, and sees the keys from `position - window + 1` to `position`.
  __device__ int position(int query) const { return S - T + query; }

  // The problem as a kernel begins with it.
  __device__ Problem begin() const {
    Problem problem = *this;
    problem.dropout.take_seed();
    return problem;
  }
};

// The rows of one head.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ T* operator[](int row) const { return data + row * stride; }
};

template <class T>
__device__ Rows<const T> rows_of(const View& x, int batch, int head) {
  return {static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride, x.time_stride};
}
template <class T>
__device__ Rows<T> rows_of(const MutableView& x, int batch, int head) {
  return {static_cast<T*>(x.data) + batch * x.batch_stride + head * x.head_stride, x.time_stride};
}

struct ForwardCall {
  Problem problem;
  View q, k, v;
  MutableView out;
  float* lse;
};

struct BackwardCall {
  Problem problem;
  View dout, q, k, v, out;
  const float *lse, *dlse;
  float* delta;  // (B, H, T): rowsum(dO ∘ O), less dlse for 16-bit dtypes
  MutableView dq, dk, dv;
};

// Blocks are numbered head by head, `blocks` for each; a grid has one dimension, since the others end at 65535.
struct Block {
  int batch, head, index;
  __device__ Block(int heads, int blocks)
      : batch(blockIdx.x / blocks / heads), head(blockIdx.x / blocks % heads), index(blockIdx.x % blocks) {}
};

template <class Call>
cudaError_t launch_blocks(void (*kernel)(Call), int64_t blocks, int threads, int shared_bytes, const Call& call,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  return launch(kernel, dim3{static_cast<unsigned>(blocks), 1, 1}, dim3{static_cast<unsigned>(threads), 1, 1},
                shared_bytes, stream, call);
}

// Calls f(size) with the smallest of the head sizes that kernels are compiled for, as a constant, that holds D.
template <class F>
cudaError_t with_head_size(int D, const F& f) {
  if (D <= 16) return f(std::integral_constant<int, 16>());
  if (D <= 32) return f(std::integral_constant<int, 32>());
  if (D <= 64) return f(std::integral_constant<int, 64>());
  if (D <= 96) return f(std::integral_constant<int, 96>());
  if (D <= 128) return f(std::integral_constant<int, 128>());
  return f(std::integral_constant<int, 256>());
}

// The kernels' launchers: attention_forward.cu, attention_backward.cu, attention_float32.cu. The backward ones come
// after `delta` is filled.
cudaError_t forward_16bit(DType dtype, const ForwardCall& call, cudaStream_t stream);
cudaError_t backward_16bit(DType dtype, const BackwardCall& call, cudaStream_t stream);
cudaError_t forward_float32(const ForwardCall& call, cudaStream_t stream);
cudaError_t backward_float32(const BackwardCall& call, cudaStream_t stream);

__host__ __device__ constexpr int ceil_div(int n, int multiple) { return (n + multiple - 1) / multiple; }
__host__ __device__ constexpr int round_up(int n, int multiple) { return ceil_div(n, multiple) * multiple; }

}  // namespace chargpt::cuda
