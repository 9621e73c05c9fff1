// Causal attention, compiled once for each instruction set by foreach_isa.h; attention.cpp holds what they share.
//
// FlashAttention-2 (Dao 2023, algorithms 1 and 2), for a cache instead of shared memory:
//   forward   For 64 queries at a time, S = scale · Q Kᵀ over up to 256 keys; from S the running row maxima m and sums
//             l, and P = exp(S - m); O ← O · exp(m_old - m) + P V. At the end O / l, and lse = m + log l.
//   backward  For 64 queries and 64 keys at a time, S again, P = exp(S - lse), dP = dO Vᵀ, dS = P ∘ (dP - rowsum(dO ∘ O));
//             dV += Pᵀ dO, dK += dSᵀ Q, dQ += dS K. dK and dV of one head stay in its thread's scratch, dQ in a tile.
//   causality Four queries are the smallest unit: their products stop at the last key that any of them sees, so little
//             more than the lower triangle is computed, and only vectors that cross the diagonal are masked.
//
// Memory: K, V (backward: Q, dO too) are packed once per head into tiles of 64 positions in the layout that the
// micro-kernel reads. One float tile with D = 64 is 16 KiB: half of a 32 KiB L1, and it is used by 16 strips in turn.
// S of 64 x 256 (64 KiB), or S, dP and dS of 64 x 64 (16 KiB each), and a packed head (T = 256, D = 64: 64 KiB for each
// of its matrices) stay in L2.
//
// Every product is one micro-kernel: 4 rows x up to 4 vectors of accumulators, which reaches 99 % of the FMA and of the
// bfloat16 dot product peak on Zen 4 (6x4: 97 %, 8x3: 98 %, 8x2: 97 %, 12x2: 63 %, which spills).

#include "simd/simd.h"
// needs what simd.h defines
#include "philox.h"
// in this order
#include "micro_kernel.h"

#include "attention_tiles.h"

#include "attention_forward.h"

#include "attention_backward.h"

namespace chargpt::cpu::CHARGPT_ISA {

template <class N>
constexpr Kernels kernels_of() {
  return {forward_items<N>, backward_items<N>, join_items<N>, partial_bytes<N>};
}

inline Kernels kernels([[maybe_unused]] DType dtype) {
#if CHARGPT_ISA_LEVEL < 4 && !(CHARGPT_ISA_LEVEL == 0 && defined(CHARGPT_BFLOAT16_DOT))
  if (dtype == DType::kFloat64) return kernels_of<Float64>();
  if (dtype == DType::kFloat32) return kernels_of<Float32>();
#endif
#if CHARGPT_ISA_LEVEL >= 4
  return kernels_of<BFloat16Tiles>();
#elif defined(CHARGPT_BFLOAT16_DOT)
  return kernels_of<BFloat16Dot>();
#else
  return kernels_of<BFloat16Widened>();
#endif
}

}  // namespace chargpt::cpu::CHARGPT_ISA
