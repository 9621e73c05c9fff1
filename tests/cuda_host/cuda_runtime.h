// CUDA on the host: a test tool that lets the .cu files of csrc/cuda compile as C++ and run on a CPU, where the address,
// thread and undefined-behaviour sanitizers can watch them.
//
//     g++ -std=c++20 -DCHARGPT_CUDA_HOST -I tests/cuda_host -x c++ kernel.cu -x none tests/cuda_host/host.cpp
//
// Every CUDA thread is a fiber: a stack of its own, switched to by host.cpp when the one before it waits. One OS thread
// runs one block at a time; several run the blocks of a grid. What the shim is strict about:
//   - Shared memory (dynamic_shared) is one heap block, to the byte, and starts as NaN. There are no __shared__ variables.
//   - A launch takes more than 48 KiB of it only where the kernel's attribute says so, as it stands then: see
//     cuda_runtime_api.h.
//   - All threads of a block meet at the same __syncthreads() of the source, and all lanes that a mask names meet at the
//     same warp operation. Where they do not, the launch fails and says who waits where, instead of hanging.
//   - cp.async (mma_host.h) turns its destination into NaN at once and fills it when the thread waits for it.
//   - For ThreadSanitizer each fiber is a thread. Only __syncthreads and __syncwarp order memory between threads; shuffles,
//     votes and mma do not, as in CUDA. So a missing barrier is a reported race, also between blocks, whatever the order
//     in which the fibers really ran.
//     g++ 12 overlooks one thing: a struct that is passed by value straight from shared or global memory. Name it first.
// What it cannot show: bank conflicts, anything about speed, the chip's weak memory order beyond races, and rounding of
// the tensor cores (here: exact products, a float32 sum).
//
// Only what the kernels use is here.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <type_traits>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- What host.cpp provides ----------------------------------------------------------------------------------------

namespace cuda_host {

using Where = std::source_location;  // of the call in the kernel

char* dynamic_shared();

// Runs `body` in every thread of the grid, and returns when all are done. cudaGetLastError() says how it went.
void run(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
         const void* context);

// kernel<<<grid, block, shared_bytes>>>(…): `body` calls the kernel with its arguments.
template <class... P, class F>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, const F& body) {
  const auto call = [](const void* f) { (*static_cast<const F*>(f))(); };
  run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, call, &body);
}

int lane();
void barrier(Where where);
void warp_barrier(uint32_t mask, Where where);
uint64_t exchange(const char* name, uint32_t mask, uint64_t value, int source, Where where);  // what `source` brings
uint32_t ballot(uint32_t mask, bool vote, Where where);
[[noreturn]] void fail(const char* what, Where where);  // ends this launch with an error

template <class T>
T shuffle(const char* name, uint32_t mask, T value, int source, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(name, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_host

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}
template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

// ---- Barriers, shuffles, votes -------------------------------------------------------------------------------------

inline void __syncthreads(cuda_host::Where where = cuda_host::Where::current()) { cuda_host::barrier(where); }

inline void __syncwarp(uint32_t mask = 0xffffffff, cuda_host::Where where = cuda_host::Where::current()) {
  cuda_host::warp_barrier(mask, where);
}

// Lanes exchange within segments of `width`; whoever would read outside its own gets its own value.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, cuda_host::Where where = cuda_host::Where::current()) {
  const int lane = cuda_host::lane();
  return cuda_host::shuffle("__shfl_sync", mask, value, (lane & -width) | (source & (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32,
                  cuda_host::Where where = cuda_host::Where::current()) {
  const int lane = cuda_host::lane(), source = lane ^ bits, end = (lane & -width) + width;
  return cuda_host::shuffle("__shfl_xor_sync", mask, value, source < end ? source : lane, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32,
                   cuda_host::Where where = cuda_host::Where::current()) {
  const int lane = cuda_host::lane(), source = lane + delta, end = (lane & -width) + width;
  return cuda_host::shuffle("__shfl_down_sync", mask, value, source < end ? source : lane, where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32,
                 cuda_host::Where where = cuda_host::Where::current()) {
  const int lane = cuda_host::lane(), source = lane - delta, begin = lane & -width;
  return cuda_host::shuffle("__shfl_up_sync", mask, value, source >= begin ? source : lane, where);
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote, cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, vote, where);
}
inline int __any_sync(uint32_t mask, bool vote, cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, vote, where) != 0;
}
inline int __all_sync(uint32_t mask, bool vote, cuda_host::Where where = cuda_host::Where::current()) {
  return cuda_host::ballot(mask, !vote, where) == 0;
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------

using std::isfinite, std::isinf, std::isnan, std::max, std::min;  // CUDA has them without std::

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }
inline float __fmul_rn(float x, float y) {  // never part of a multiply-add
  const volatile float product = x * y;
  return product;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, const T& value) {
  *p = value;
}
