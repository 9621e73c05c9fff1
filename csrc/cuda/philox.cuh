// Dropout's random words, Philox 4x32-10 (Salmon et al. 2011). The rule is in chargpt/kernels/philox.py: a counter is
// (key position / 4, query position, batch · H + head, 0), and output word j decides for the key position 4 · … + j.

#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../common/philox.h"

namespace chargpt::cuda {

struct Dropout {
  bool on = false;
  uint32_t threshold = 0;      // weights with a smaller random word are dropped
  float grow = 1;              // factor on the others
  uint32_t key[2] = {0, 0};

  Dropout() = default;
  Dropout(double p, uint64_t seed)
      : on(true),
        threshold(static_cast<uint32_t>(std::floor(p * 4294967296.0))),
        grow(static_cast<float>(1.0 / (1.0 - p))),
        key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)} {}
};

// word[j] decides for key position 4 · key_block + j of the query at `position`.
__device__ inline void random_words(uint32_t (&word)[4], const Dropout& dropout, uint32_t key_block, uint32_t position,
                                    uint32_t batch_head) {
  uint32_t c0 = key_block, c1 = position, c2 = batch_head, c3 = 0;
  uint32_t k0 = dropout.key[0], k1 = dropout.key[1];
#pragma unroll 5  // all ten at once, and the keys of each round would be kept in 20 registers
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
