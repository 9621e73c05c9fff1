// Dropout's random words, Philox 4x32-7 (Salmon et al. 2011). The rule is in chargpt/kernels/philox.py: a counter is
// (key position / 8, query position, batch · H + head, 0), and half j of the output decides for key position 8 · … + j.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/philox.h"

namespace chargpt::cuda {

struct Dropout {
  bool on = false;
  uint32_t threshold = 0;      // weights with fewer random 16 bits are dropped
  float grow = 1;              // factor on the others
  uint32_t key[2] = {0, 0};
  const int64_t* seed = nullptr;  // where the seed lies on the device, and `key` is not known to the host

  Dropout() = default;
  Dropout(double p, uint64_t seed, const int64_t* seed_on_device)
      : on(true),
        threshold(static_cast<uint32_t>(p * kDropoutUnit)),
        grow(static_cast<float>(1.0 / (1.0 - p))),
        key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
        seed(seed_on_device) {}

  // Reads a seed that lies on the device: what a kernel does first. So a CUDA graph drops other weights at each replay.
  __device__ void take_seed() {
    if (seed == nullptr) return;
    key[0] = static_cast<uint32_t>(*seed);
    key[1] = static_cast<uint32_t>(static_cast<uint64_t>(*seed) >> 32);
  }

  __device__ bool keeps_low(uint32_t word) const { return (word & 0xFFFF) >= threshold; }
  __device__ bool keeps_high(uint32_t word) const { return word >= threshold << 16; }
};

// The lower half of word[j] decides for key position 8 · key_block + 2 j of the query at `position`, the other half for
// the next one. kTogether: rounds without a loop around them
template <int kTogether = kPhiloxRounds>
__device__ inline void random_words(uint32_t (&word)[4], const Dropout& dropout, uint32_t key_block, uint32_t position,
                                    uint32_t batch_head) {
  uint32_t c0 = key_block, c1 = position, c2 = batch_head, c3 = 0;
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
#pragma unroll kTogether
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxFactor0} * c0, p1 = uint64_t{kPhiloxFactor1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

}  // namespace chargpt::cuda
