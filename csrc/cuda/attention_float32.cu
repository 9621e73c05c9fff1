// Launches the kernels for float32.

#include "attention_float32.cuh"

namespace chargpt::cuda {
namespace {

template <int D>
constexpr int shared_bytes(int tiles, int squares) {
  using Config = Float32Config<D>;
  return (tiles * Config::kTileFloats + squares * Config::kSquareFloats) * static_cast<int>(sizeof(float));
}

template <int D>
cudaError_t backward(const BackwardCall& call, cudaStream_t stream) {
  using Config = Float32Config<D>;
  const Problem& problem = call.problem;
  constexpr int kDqBytes = shared_bytes<D>(4, 1), kDkDvBytes = shared_bytes<D>(4, Config::kTogether ? 2 : 1);
  static_assert(kDqBytes <= kSharedBytesSm80 && kDkDvBytes <= kSharedBytesSm80);
  static_assert(D > 128 || (kDqBytes <= kSharedBytesSm86 && kDkDvBytes <= kSharedBytesSm86));
  static_assert(D <= 128 || (kDqBytes == kWideFloat32SharedBytes && kDkDvBytes == kWideFloat32SharedBytes));

  const auto launch_dk_dv = [&](void (*kernel)(BackwardCall)) {
    const int64_t blocks = int64_t{ceil_div(problem.S, Config::kTile)} * problem.batches * problem.heads_kv;
    return launch_blocks(kernel, blocks, Config::kThreads, kDkDvBytes, call, stream);
  };
  cudaError_t error;
  if constexpr (Config::kTogether) {
    error = launch_dk_dv(attention_backward_dk_dv_float32<D, true, true>);
  } else {
    error = launch_dk_dv(attention_backward_dk_dv_float32<D, true, false>);
    if (error == cudaSuccess) error = launch_dk_dv(attention_backward_dk_dv_float32<D, false, true>);
  }
  if (error != cudaSuccess) return error;
  const int64_t blocks = int64_t{ceil_div(problem.T, Config::kTile)} * problem.batches * problem.heads;
  return launch_blocks(attention_backward_dq_float32<D>, blocks, Config::kThreads, kDqBytes, call, stream);
}

}  // namespace

cudaError_t forward_float32(const ForwardCall& call, cudaStream_t stream) {
  const Problem& problem = call.problem;
  return with_head_size(problem.D, [&](auto size) {
    constexpr int D = decltype(size)::value, kBytes = shared_bytes<D>(3, 1);
    using Config = Float32Config<D>;
    static_assert(kBytes <= kSharedBytesSm80 && (D > 128 || kBytes <= kSharedBytesSm86));
    const int64_t blocks = int64_t{ceil_div(problem.T, Config::kTile)} * problem.batches * problem.heads;
    return launch_blocks(attention_forward_float32<D>, blocks, Config::kThreads, kBytes, call, stream);
  });
}

cudaError_t backward_float32(const BackwardCall& call, cudaStream_t stream) {
  return with_head_size(call.problem.D, [&](auto size) { return backward<decltype(size)::value>(call, stream); });
}

}  // namespace chargpt::cuda
