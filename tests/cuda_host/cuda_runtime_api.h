// What the kernels' launchers use of the CUDA runtime, on the CPU: see cuda_runtime.h.

#pragma once

#include <cstddef>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;

cudaError_t cudaGetLastError();  // of this host thread, which then has none

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

// The chip that is played, an H100 with two multiprocessors. Tests may set them while nothing runs.
inline int host_multiprocessors = 2;
inline int host_shared_bytes = 232448;  // the most that one block can have

// Each host thread has its own of these, which its test may set: which of several such chips it launches on, and how
// many launches it has made.
inline thread_local int host_device = 0;
inline thread_local int host_launches = 0;

inline cudaError_t cudaGetDevice(int* device) {
  *device = host_device;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = host_multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = host_shared_bytes + 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = host_shared_bytes; return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
};
struct cudaFuncAttributes {
  int maxDynamicSharedSizeBytes;
};

// Of a kernel on this host thread's device. A launch with more is an error. It is 48 KiB until somebody sets it, then
// what was set last, by whichever host thread.
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
