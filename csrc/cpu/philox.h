// Dropout's random halves of words, Philox 4x32-7 (Salmon et al. 2011), for one instruction set: included after simd.h and
// common/philox.h. Here each 64-bit lane carries one counter, so that a product needs no shuffling.

namespace chargpt::cpu::CHARGPT_ISA {

CHARGPT_INLINE Vec<uint64_t> multiply_low_words(Vec<uint64_t> a, uint32_t b) {  // lane by lane, the upper words ignored
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)broadcast<uint64_t>(b));
#elif CHARGPT_ISA_LEVEL == 1
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)broadcast<uint64_t>(b));
#else
  return (a & 0xFFFFFFFF) * b;
#endif
}

// The two halves of the lower word of each lane, as 32-bit numbers, the lower half first.
CHARGPT_INLINE Vec<uint64_t> halves_of(Vec<uint64_t> word) { return (word & 0xFFFF) | (word & 0xFFFF0000) << 16; }

// halves[j] = the 16 random bits of key position first + j, for j < count. first: a multiple of 8; count is rounded up
// to a multiple of 8 · kLanes<uint64_t> ≤ 64, to which `halves` must have room.
CHARGPT_INLINE void random_halves(uint64_t seed, uint32_t batch_head, uint32_t query, uint32_t first, int count,
                                  uint32_t* halves) {
  constexpr int kCounters = kLanes<uint64_t>;
  for (int j = 0; j < count; j += 8 * kCounters) {
    // Only the lower word of a lane counts, so the upper ones are left as they fall.
    Vec<uint64_t> c0 = (Vec<uint64_t>)iota<uint64_t>() + (first + j) / 8, c1 = broadcast<uint64_t>(query),
                  c2 = broadcast<uint64_t>(batch_head), c3 = broadcast<uint64_t>(0);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const Vec<uint64_t> p0 = multiply_low_words(c0, kPhiloxFactor0), p1 = multiply_low_words(c2, kPhiloxFactor1);
      c0 = (p1 >> 32) ^ c1 ^ k0;
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ k1;
      c3 = p0;
      k0 += kPhiloxKeyStep0;
      k1 += kPhiloxKeyStep1;
    }
    // A lane of h0 … h3 has halves 0 and 1, 2 and 3, … of one counter: two rounds of interleaving put them in order.
    const Vec<uint64_t> h0 = halves_of(c0), h1 = halves_of(c1), h2 = halves_of(c2), h3 = halves_of(c3);
    const Vec<uint64_t> even[2] = {interleave_low<uint64_t>(h0, h2), interleave_high<uint64_t>(h0, h2)};
    const Vec<uint64_t> odd[2] = {interleave_low<uint64_t>(h1, h3), interleave_high<uint64_t>(h1, h3)};
    for (int i = 0; i < 2; ++i) {
      store<uint64_t>(halves + j + 4 * i * kCounters, interleave_low<uint64_t>(even[i], odd[i]));
      store<uint64_t>(halves + j + (4 * i + 2) * kCounters, interleave_high<uint64_t>(even[i], odd[i]));
    }
  }
}

}  // namespace chargpt::cpu::CHARGPT_ISA
