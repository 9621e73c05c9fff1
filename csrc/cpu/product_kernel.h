// C += Aᵀ B of product.h, compiled once for each instruction set by foreach_isa.h, over micro_kernel.h.
//
// B is packed once, in tiles of 64 rows. Then, for 64 rows of C at a time: tile after tile, 64 columns of A are packed, and
// strips of them multiplied with one panel of B after the other, which stays in L1 meanwhile. The sums stay in L2, and
// meet C once.

#include "simd/simd.h"
// needs what simd.h defines
#include "micro_kernel.h"

namespace chargpt::cpu::CHARGPT_ISA {

#if CHARGPT_ISA_LEVEL >= 4
using Half = BFloat16Tiles;
#elif defined(CHARGPT_BFLOAT16_DOT)
using Half = BFloat16Dot;
#else
using Half = BFloat16Widened;
#endif

inline void pack_items(void* context, int64_t begin, int64_t end) {
  const ProductCall& call = *static_cast<const ProductCall*>(context);
  const TransposedProduct& product = call.product;
  const Layout<Half> layout(product.N);
  for (int64_t tile = begin; tile < end; ++tile) {
    pack_paired<Half>(layout, product.b + tile * kTile * product.b_stride, product.b_stride,
                      clamp(product.K - tile * kTile, 0, kTile),
                      static_cast<Half::Word*>(call.packed) + tile * layout.rows_tile());
  }
}

inline void multiply_items(void* context, int64_t begin, int64_t end) {
  constexpr int kW = kLanes<float>;
  const ProductCall& call = *static_cast<const ProductCall*>(context);
  const TransposedProduct& product = call.product;
  const Layout<Half> layout(product.N);
  Layout<Half> a_layout(kTile);
  Arena measure{nullptr};
  const int64_t a_words = a_layout.rows_tile(), sums = int64_t{kTile} * layout.columns;
  measure.take<Half::Word>(2 * a_words);
  measure.take<float>(sums);
  Arena arena{static_cast<char*>(std::aligned_alloc(64, measure.used))};
  if (arena.base == nullptr) {
    call.out_of_memory->store(true);
    return;
  }
  Half::Word* const paired = arena.take<Half::Word>(2 * a_words);
  Half::Word* const turned = paired + a_words;
  float* const sum = arena.take<float>(sums);
  const MatrixUnit unit;
  for (int64_t block = begin; block < end; ++block) {
    const int rows = a_layout.D = clamp(product.M - block * kTile, 0, kTile);
    std::memset(sum, 0, sizeof(float) * sums);
    for (int64_t k = 0; k < product.K; k += kTile) {
      const int depth = clamp(product.K - k, 0, kTile);
      pack_paired<Half>(a_layout, product.a + k * product.a_stride + block * kTile, product.a_stride, depth, paired);
      if constexpr (kTiles<Half>) turn<Half>(paired, turned);
      const Half::Word* tile = static_cast<const Half::Word*>(call.packed) + k / kTile * layout.rows_tile();
      for (int at = 0; at < layout.columns; at += layout.width, tile += layout.rows_panel()) {
        const int vectors = (layout.columns - at < layout.width ? layout.columns - at : layout.width) / kW;
        for (int r = 0; r < rows; r += Half::kRows) {
          const A<Half> a = kTiles<Half>
                                ? A<Half>{turned + r * (kTile / 2), kTile / 2, 1}
                                : A<Half>{paired + r / a_layout.width * a_layout.rows_panel() + r % a_layout.width, 1,
                                          a_layout.width};
          strip<Half, true>(vectors, whole_words<Half>(depth), a, B<Half>{tile, layout.width, layout.rows_panel()},
                            sum + r * layout.columns + at, layout.columns);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      float* c = product.c + (block * kTile + r) * product.c_stride;
      const float* from = sum + r * layout.columns;
      int64_t n = 0;
      for (; n + kW <= product.N; n += kW) store<float>(c + n, load<float>(c + n) + load<float>(from + n));
      for (; n < product.N; ++n) c[n] += from[n];
    }
  }
  std::free(arena.base);
}

inline int64_t packed_bytes(const TransposedProduct& product) {
  const int64_t tiles = (product.K + kTile - 1) / kTile;
  return round_up(tiles * Layout<Half>(product.N).rows_tile() * static_cast<int64_t>(sizeof(Half::Word)), 64);
}

inline ProductKernels product_kernels() { return {pack_items, multiply_items, packed_bytes}; }

}  // namespace chargpt::cpu::CHARGPT_ISA
