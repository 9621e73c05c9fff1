// How kernels are launched and find their shared memory: the two places where CUDA's syntax has no plain C++ twin, so
// that the same .cu files compile for the CPU (CHARGPT_CUDA_HOST, tests/cuda_host).

#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace chargpt::cuda {

#ifdef CHARGPT_CUDA_HOST

inline char* dynamic_shared() { return cuda_host::dynamic_shared(); }

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t, A... args) {
  return cuda_host::launch(grid, block, dynamic_shared_bytes, [=] { kernel(static_cast<P>(args)...); });
}

#else

// The block's shared memory, as many bytes as the launch asked for.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

// Queues the kernel on the stream. Returns the launch's error, not those of its execution, and does not wait.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
                   A... args) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (dynamic_shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(dynamic_shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(static_cast<P>(args)...);
  return cudaGetLastError();
}

#endif

}  // namespace chargpt::cuda
