// Causal attention on the GPU: turns a call into what the kernels want, makes delta, and calls the launchers.

#include "attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "attention_problem.cuh"

namespace chargpt::cuda {
namespace {

int64_t element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether all rows of x begin at multiples of `bytes`.
template <class AnyView>
bool aligned(const AnyView& x, int64_t element, int64_t bytes) {
  const int64_t strides = x.batch_stride | x.head_stride | x.time_stride;
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && strides * element % bytes == 0;
}

Problem problem_of(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                   std::initializer_list<View> read, std::initializer_list<MutableView> written) {
  const int64_t element = element_size(dtype);
  Problem problem;
  problem.batches = static_cast<int>(shape.B);
  problem.heads = static_cast<int>(shape.H);
  problem.heads_kv = static_cast<int>(shape.H_kv);
  problem.group = static_cast<int>(shape.H / shape.H_kv);
  problem.T = static_cast<int>(shape.T);
  problem.S = static_cast<int>(shape.S);
  problem.D = static_cast<int>(shape.D);
  problem.window = static_cast<int>(options.window > 0 && options.window < shape.S ? options.window : shape.S);
  problem.scale = static_cast<float>(options.scale);
  problem.scale_log2 = static_cast<float>(options.scale * 1.4426950408889634);
  if (options.dropout) problem.dropout = Dropout(options.dropout_p, options.seed, options.device_seed);
  problem.vectors = shape.D * element % 16 == 0;
  for (const View& x : read) problem.vectors = problem.vectors && aligned(x, element, 16);
  problem.pairs = shape.D % 2 == 0;
  for (const MutableView& x : written) problem.pairs = problem.pairs && aligned(x, element, 2 * element);
  return problem;
}

// Kernels count in 32 bits, and add a window to a position.
bool too_large(const AttentionShape& shape) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return shape.B > kMost || shape.H > kMost || shape.H_kv > kMost || shape.B * shape.H > kMost || shape.S > kMost ||
         shape.D > kMaxHeadSize;
}

// ---- delta ---------------------------------------------------------------------------------------------------------

constexpr int kDeltaThreads = 128, kDeltaLanes = 4;  // threads of a block, and of a row

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Channels [begin, begin + kRun) of the product of two rows. Multiply-adds by name, so that both branches round alike.
template <class Element>
__device__ inline float run_product(const Problem& problem, const Element* x, const Element* y, int begin) {
  constexpr int kVector = 16 / sizeof(Element);
  float sum = 0;
  if (problem.vectors) {
#pragma unroll
    for (int d = 0; d < kRun; d += kVector) {
      if (begin + d >= problem.D) break;
      alignas(16) Element left[kVector], right[kVector];
      *reinterpret_cast<uint4*>(left) = *reinterpret_cast<const uint4*>(x + begin + d);
      *reinterpret_cast<uint4*>(right) = *reinterpret_cast<const uint4*>(y + begin + d);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum = fmaf(to_float(left[i]), to_float(right[i]), sum);
    }
  } else {
    const int end = min(begin + kRun, problem.D);
    for (int d = begin; d < end; ++d) sum = fmaf(to_float(x[d]), to_float(y[d]), sum);
  }
  return sum;
}

// delta = rowsum(dO ∘ O), less dlse for 16-bit dtypes; float32 keeps dlse apart, which would lose digits to a larger
// delta. Runs of channels are summed up as attention_float32.cuh sums up dO Vᵀ: so where a query sees but one key, and
// O is V, the difference of the two is 0 exactly, as it should be.
// budget: attention_backward_delta registers<=48 shared<=0
template <class Element>
__global__ void __launch_bounds__(kDeltaThreads) attention_backward_delta(BackwardCall call) {
  constexpr int kRounds = kMaxHeadSize / (kRun * kDeltaLanes), kRows = kDeltaThreads / kDeltaLanes;
  const Problem& problem = call.problem;
  const int lane = threadIdx.x % kDeltaLanes;
  const Block block(problem.heads, ceil_div(problem.T, kRows));
  const int query = block.index * kRows + threadIdx.x / kDeltaLanes;
  const int row = min(query, problem.T - 1);  // all lanes are needed below
  const Element* dout = rows_of<Element>(call.dout, block.batch, block.head)[row];
  const Element* out = rows_of<Element>(call.out, block.batch, block.head)[row];
  float delta = 0;
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int begin = (round * kDeltaLanes + lane) * kRun;
    const float sum = begin < problem.D ? run_product(problem, dout, out, begin) : 0;
#pragma unroll
    for (int i = 0; i < kDeltaLanes; ++i) delta += __shfl_sync(0xFFFFFFFF, sum, i, kDeltaLanes);
  }
  if (query < problem.T && lane == 0) {
    const int64_t at = (int64_t{block.batch} * problem.heads + block.head) * problem.T + query;
    const bool fold = sizeof(Element) == 2 && call.dlse != nullptr;
    call.delta[at] = fold ? delta - call.dlse[at] : delta;
  }
}

cudaError_t fill_delta(DType dtype, const BackwardCall& call, cudaStream_t stream) {
  const Problem& problem = call.problem;
  const auto kernel = dtype == DType::kFloat32   ? attention_backward_delta<float>
                      : dtype == DType::kFloat16 ? attention_backward_delta<__half>
                                                 : attention_backward_delta<__nv_bfloat16>;
  const int64_t blocks = ceil_div(problem.T, kDeltaThreads / kDeltaLanes);
  return launch_blocks(kernel, blocks * problem.batches * problem.heads, kDeltaThreads, 0, call, stream);
}

}  // namespace

cudaError_t attention_forward(DType dtype, const AttentionShape& shape, const AttentionOptions& options, const View& q,
                              const View& k, const View& v, const MutableView& out, float* lse, cudaStream_t stream) {
  if (too_large(shape)) return cudaErrorInvalidValue;
  const ForwardCall call{problem_of(dtype, shape, options, {q, k, v}, {out}), q, k, v, out, lse};
  return dtype == DType::kFloat32 ? forward_float32(call, stream) : forward_16bit(dtype, call, stream);
}

size_t attention_backward_workspace(DType, const AttentionShape& shape) {
  return static_cast<size_t>(shape.B * shape.H * shape.T) * sizeof(float);
}

cudaError_t attention_backward(DType dtype, const AttentionShape& shape, const AttentionOptions& options,
                               const View& dout, const View& q, const View& k, const View& v, const View& out,
                               const float* lse, const float* dlse, const MutableView& dq, const MutableView& dk,
                               const MutableView& dv, void* workspace, cudaStream_t stream) {
  if (too_large(shape)) return cudaErrorInvalidValue;
  const BackwardCall call{problem_of(dtype, shape, options, {dout, q, k, v, out}, {dq, dk, dv}),
                          dout, q, k, v, out, lse, dlse, static_cast<float*>(workspace), dq, dk, dv};
  const cudaError_t error = fill_delta(dtype, call, stream);
  if (error != cudaSuccess) return error;
  return dtype == DType::kFloat32 ? backward_float32(call, stream) : backward_16bit(dtype, call, stream);
}

}  // namespace chargpt::cuda
