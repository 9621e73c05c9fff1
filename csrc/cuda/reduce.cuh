// Reductions over neighbouring lanes of a warp and over a block. Each has one order, so its result is deterministic, and
// the same bits in all lanes.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace chargpt::cuda {

constexpr int kWarp = 32;

__device__ inline int lane_in_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

// What the lane has whose number differs in `bits`. T: any type of whole words.
template <class T>
__device__ T exchange(const T& x, int bits) {
  static_assert(sizeof(T) % sizeof(uint32_t) == 0);
  uint32_t words[sizeof(T) / sizeof(uint32_t)];
  memcpy(words, &x, sizeof x);
  for (uint32_t& word : words) word = __shfl_xor_sync(0xffffffff, word, bits);
  T other;
  memcpy(&other, words, sizeof x);
  return other;
}

// Over each group of kLanes neighbouring lanes, a power of two; all groups of the warp come here together.
template <int kLanes, class T, class Combine>
__device__ T reduce_lanes(T x, Combine combine) {
#pragma unroll
  for (int bits = 1; bits < kLanes; bits *= 2) {
    const T other = exchange(x, bits);
    x = (lane_in_warp() & bits) != 0 ? combine(other, x) : combine(x, other);
  }
  return x;
}

// Over the block, whose threads stand in one dimension and fill their warps. scratch: shared memory for kWarp values,
// which a later call may use again after one more barrier. nothing: what changes no value that it is combined with.
template <class T, class Combine>
__device__ T reduce_block(T x, const T& nothing, T* scratch, Combine combine) {
  x = reduce_lanes<kWarp>(x, combine);
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  if (lane_in_warp() == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = nothing;
  if (lane_in_warp() < warps) x = scratch[lane_in_warp()];
  return reduce_lanes<kWarp>(x, combine);
}

}  // namespace chargpt::cuda
