// Launches the backward kernels for 16-bit dtypes.

#include "attention_backward.cuh"

namespace chargpt::cuda {
namespace {

template <class Element, int D>
cudaError_t backward(const BackwardCall& call, cudaStream_t stream) {
  using DkDv = DkDvConfig<D>;
  using Dq = DqConfig<D>;
  constexpr int kDkDvBytes = dk_dv_shared_bytes<Element, D>(), kDqBytes = backward_shared_bytes<Element, D, Dq>();
  static_assert(kDkDvBytes <= kSharedBytesSm86 && kDqBytes <= kSharedBytesSm86);
  const Problem& problem = call.problem;

  const int64_t key_blocks = ceil_div(problem.S, 16 * DkDv::kM * DkDv::kWarps);
  const auto launch_dk_dv = [&](void (*kernel)(BackwardCall)) {
    return launch_blocks(kernel, key_blocks * problem.batches * problem.heads_kv, DkDv::kThreads, kDkDvBytes, call,
                         stream);
  };
  cudaError_t error;
  if constexpr (DkDv::kTogether) {
    error = launch_dk_dv(attention_backward_dk_dv<D, Element, true, true>);
  } else {
    error = launch_dk_dv(attention_backward_dk_dv<D, Element, true, false>);
    if (error == cudaSuccess) error = launch_dk_dv(attention_backward_dk_dv<D, Element, false, true>);
  }
  if (error != cudaSuccess) return error;

  const int64_t query_blocks = ceil_div(problem.T, 16 * Dq::kM * Dq::kWarps);
  return launch_blocks(attention_backward_dq<D, Element>, query_blocks * problem.batches * problem.heads, Dq::kThreads,
                       kDqBytes, call, stream);
}

}  // namespace

cudaError_t backward_16bit(DType dtype, const BackwardCall& call, cudaStream_t stream) {
  return with_head_size(call.problem.D, [&](auto size) {
    constexpr int D = decltype(size)::value;
    return dtype == DType::kFloat16 ? backward<__half, D>(call, stream) : backward<__nv_bfloat16, D>(call, stream);
  });
}

}  // namespace chargpt::cuda
