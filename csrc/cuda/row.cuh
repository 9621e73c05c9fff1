// Rows of a matrix that may start at any element's address, as they do where V is odd, read and written 16 bytes at a
// time all the same. A row is cut where addresses are multiples of 16 bytes: into a head of fewer than K elements, full
// chunks of K elements, and a tail of fewer than K. Head and tail together are the row's edges, fewer than 2 K - 1.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace chargpt::cuda {

template <class T>
constexpr int kChunk = static_cast<int>(sizeof(uint4) / sizeof(T));  // K
template <class T>
constexpr int kMostEdges = 2 * (kChunk<T> - 1);

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(float x) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two neighbours in one register.
template <class T>
__device__ float2 widen_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, __half>) {
    __half2 pair;
    memcpy(&pair, &word, sizeof word);
    return __half22float2(pair);
  } else {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000));
  }
}
template <class T>
__device__ uint32_t narrow_pair(float x, float y) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(x, y);
    memcpy(&word, &pair, sizeof word);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    memcpy(&word, &pair, sizeof word);
  }
  return word;
}

template <class T>
__device__ void widen(const uint4& chunk, float (&x)[kChunk<T>]) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == sizeof(float)) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 pair = widen_pair<T>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    }
  }
}

template <class T>
__device__ uint4 narrow(const float (&x)[kChunk<T>]) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
  } else {
    return make_uint4(narrow_pair<T>(x[0], x[1]), narrow_pair<T>(x[2], x[3]), narrow_pair<T>(x[4], x[5]),
                      narrow_pair<T>(x[6], x[7]));
  }
}

template <class T>
struct Row {
  const T* data;
  int head, chunks, edges;  // elements, chunks, elements

  __device__ Row(const T* row, int V) : data(row) {
    constexpr int K = kChunk<T>;
    const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % K);  // a multiple of 16 bytes
    head = min((K - past) % K, V);
    chunks = (V - head) / K;
    edges = V - chunks * K;
  }

  // Where in the row they begin.
  __device__ int chunk_at(int chunk) const { return head + chunk * kChunk<T>; }
  __device__ int edge_at(int edge) const { return edge < head ? edge : edge + chunks * kChunk<T>; }

  __device__ const uint4* chunk(int i) const { return reinterpret_cast<const uint4*>(data + chunk_at(i)); }
  __device__ float edge(int i) const { return widen(__ldg(data + edge_at(i))); }
};

// Whether chunks of the one are chunks of the other.
__device__ inline bool cut_alike(const void* row, const void* other) {
  return (reinterpret_cast<uintptr_t>(row) - reinterpret_cast<uintptr_t>(other)) % sizeof(uint4) == 0;
}

// One store of 16 bytes. (An assignment may be taken apart: nvcc 13.0 made four stores of 4 bytes of it.)
template <class T>
__device__ void store_chunk(T* out, const uint4& chunk) {
  __stcg(reinterpret_cast<uint4*>(out), chunk);
}

// Writes K elements to where they may not be a chunk.
template <class T>
__device__ void store(T* out, const float (&x)[kChunk<T>], bool is_chunk) {
  if (is_chunk) {
    store_chunk(out, narrow<T>(x));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) out[i] = narrow<T>(x[i]);
  }
}

}  // namespace chargpt::cuda
