// Launches the forward kernels for 16-bit dtypes.

#include "attention_forward.cuh"

#include <algorithm>

namespace chargpt::cuda {
namespace {

// Whether keys and values of a head stay in shared memory: where they fit, there is a head for each multiprocessor, and
// queries enough for warps that use what they load. (Reasoned, not measured.)
cudaError_t resident_is_better(const Problem& problem, int shared_bytes, bool& better) {
  int device = 0, multiprocessors = 0, most_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  better = problem.S <= kResidentKeys && problem.S <= 2 * problem.T && shared_bytes <= most_bytes &&
           problem.batches * problem.heads >= multiprocessors;
  return error;
}

template <class Element, int D>
cudaError_t forward(const ForwardCall& call, cudaStream_t stream) {
  using Config = ForwardConfig<D>;
  using Memory = ForwardMemory<Element, D>;
  const Problem& problem = call.problem;
  const int64_t heads = int64_t{problem.batches} * problem.heads;
  if constexpr (D <= kResidentHeadSize) {
    static_assert(Memory::resident(kResidentKeys, kResidentWarps) <= kSharedBytesSm80);
    // Two strips for each warp, a heavy one and a light one
    const int warps = std::min(kResidentWarps, ceil_div(problem.T, 2 * kResidentStrip));
    const int shared_bytes = Memory::resident(problem.S, warps);
    bool better = false;
    const cudaError_t error = resident_is_better(problem, shared_bytes, better);
    if (error != cudaSuccess) return error;
    if (better) {
      return launch_blocks(attention_forward_resident<D, Element>, heads, 32 * warps, shared_bytes, call, stream);
    }
  }
  static_assert(Memory::kStreaming <= kSharedBytesSm86);
  const int64_t blocks = ceil_div(problem.T, Config::kWarps * Config::kStrip);
  return launch_blocks(attention_forward_streaming<D, Element>, heads * blocks, Config::kThreads, Memory::kStreaming,
                       call, stream);
}

}  // namespace

cudaError_t forward_16bit(DType dtype, const ForwardCall& call, cudaStream_t stream) {
  if (call.problem.T == 0 || call.problem.batches * call.problem.heads == 0) return cudaSuccess;
  return with_head_size(call.problem.D, [&](auto size) {
    constexpr int D = decltype(size)::value;
    return dtype == DType::kFloat16 ? forward<__half, D>(call, stream) : forward<__nv_bfloat16, D>(call, stream);
  });
}

}  // namespace chargpt::cuda
