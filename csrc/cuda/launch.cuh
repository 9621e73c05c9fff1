// How kernels are launched and find their shared memory: the two places where CUDA's syntax has no plain C++ twin, so
// that the same .cu files compile for the CPU (CHARGPT_CUDA_HOST, tests/cuda_host).

#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace chargpt::cuda {

#ifdef CHARGPT_CUDA_HOST

inline char* dynamic_shared() { return cuda_host::dynamic_shared(); }

#else

// The block's shared memory, as many bytes as the launch asked for.
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(128) char bytes[];
  return bytes;
}

#endif

// Lets blocks of the kernel have `bytes` of dynamic shared memory on the current device. More than 48 KiB have to be
// asked for, and what is asked for is a limit of the kernel, not of the launch: it holds for launches that other host
// threads are about to make, and for those in CUDA graphs. So it is only ever set to one value, all that the device has
// (less what a kernel declares, but ours declare nothing). cudaErrorInvalidValue where `bytes` are more than that.
template <class... P>
cudaError_t allow_shared(void (*kernel)(P...), size_t bytes) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return cudaSuccess;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  if (bytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Queues the kernel on the stream. Returns the launch's error, not those of its execution, and does not wait.
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared_bytes, cudaStream_t stream,
                   A... args) {
  const cudaError_t error = allow_shared(kernel, dynamic_shared_bytes);
  if (error != cudaSuccess) return error;
#ifdef CHARGPT_CUDA_HOST
  cuda_host::launch(kernel, grid, block, dynamic_shared_bytes, [=] { kernel(static_cast<P>(args)...); });
#else
  kernel<<<grid, block, dynamic_shared_bytes, stream>>>(static_cast<P>(args)...);
#endif
  return cudaGetLastError();
}

}  // namespace chargpt::cuda
