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

#include "simd.h"
// needs what simd.h defines
#include "philox.h"

namespace chargpt::cpu::CHARGPT_ISA {

// How a dtype is stored, what the micro-kernel multiplies (words of kPair consecutive elements of the contracted
// dimension), and what it accumulates in.

struct Float32 {
  using Storage = float;
  using Word = float;
  using Acc = float;
  static constexpr int kPair = 1;
};
struct Float64 {
  using Storage = double;
  using Word = double;
  using Acc = double;
  static constexpr int kPair = 1;
};
struct BFloat16Widened {  // where the CPU has no bfloat16 dot product
  using Storage = uint16_t;
  using Word = float;
  using Acc = float;
  static constexpr int kPair = 1;
};
struct BFloat16Dot {
  using Storage = uint16_t;
  using Word = int32_t;
  using Acc = float;
  static constexpr int kPair = 2;
};

inline constexpr int kChunk = 256;  // keys between two rescalings of O in the forward pass
inline constexpr int kStrip = 4;    // rows of the micro-kernel
inline constexpr int kSpan = CHARGPT_ISA_LEVEL >= 2 ? 4 : 2;  // its vectors: all that the registers hold
inline constexpr int kChunkPitch = kChunk + 16;  // of a row of S, so that rows do not share the sets of L1

CHARGPT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
CHARGPT_INLINE int clamp(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// Sizes of the packed operands of a head, in words.
template <class N>
struct Layout {
  static constexpr int kW = kLanes<typename N::Word>;
  int D;
  int columns;  // D in whole vectors: a row of accumulators
  int depth;    // words that hold D elements: the contracted dimension of S and dP
  int pitch;    // depth in whole vectors: a row of the A operand
  int width;    // columns of one panel of a rows tile

  explicit Layout(int64_t d) : D(static_cast<int>(d)) {
    columns = static_cast<int>(round_up(D, kW));
    depth = (D + N::kPair - 1) / N::kPair;
    pitch = static_cast<int>(round_up(depth, kW));
    width = columns < kSpan * kW ? columns : kSpan * kW;
  }
  int64_t panels() const { return (columns + width - 1) / width; }
  int64_t rows_panel() const { return int64_t{kTile} / N::kPair * width; }  // words between panels
  int64_t rows_tile() const { return panels() * rows_panel(); }
  int64_t turned_panel() const { return int64_t{depth} * kSpan * kW; }
  int64_t turned_tile() const { return kTile / (kSpan * kW) * turned_panel(); }
};

// ---- The micro-kernel ----------------------------------------------------------------------------------------------

template <class N>
CHARGPT_INLINE Vec<typename N::Acc> multiply_add(Vec<typename N::Word> a, Vec<typename N::Word> b,
                                                 Vec<typename N::Acc> c) {
#if CHARGPT_ISA_LEVEL >= 3
  if constexpr (N::kPair == 2) return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  if constexpr (N::kPair == 1) return a * b + c;
}

template <class N>
struct A {  // the operand whose words are broadcast
  const typename N::Word* data;
  int64_t row, step;  // words between rows, and between words of the contracted dimension
};
template <class N>
struct B {  // the operand that is read in vectors; panels of kSpan vectors
  const typename N::Word* data;
  int64_t step, panel;
};

// Of the `depth` words that S or dP contract, those added up one after the other. For D = 64 in float32, runs of 16 give dQ
// 2/3 of the rounding error of one run of 64, within a factor of 1.5 of PyTorch's; runs of 32 would be 2 % faster.
template <class N>
CHARGPT_INLINE int run_of(int depth) {
  return N::kPair == 1 && depth > 32 ? 16 : depth;
}

// Without fused multiply-adds every product is rounded too, and no run of float32 is short enough to be as right as
// PyTorch: S, dP and delta are summed in float64 there.
template <class N>
inline constexpr bool kSumsInDouble = CHARGPT_ISA_LEVEL == 0 && std::is_same_v<typename N::Acc, float>;

// C (4 x Span vectors) = alpha · A B, or C += A B, over `depth` words.
template <class N, int Span, bool kAdd>
[[gnu::noinline]] void strip_of(int depth, A<N> a, const typename N::Word* b, int64_t b_step, typename N::Acc* c,
                                int64_t c_row, typename N::Acc alpha) {
  using Acc = typename N::Acc;
  constexpr int kW = kLanes<Acc>;
  if constexpr (kSumsInDouble<N> && !kAdd) {
    for (int r = 0; r < kStrip; ++r) {
      double sum[Span * kW] = {};
      for (int k = 0; k < depth; ++k) {
        const double scalar = a.data[r * a.row + k * a.step];
        for (int n = 0; n < Span * kW; ++n) sum[n] += scalar * b[k * b_step + n];
      }
      for (int n = 0; n < Span * kW; ++n) c[r * c_row + n] = static_cast<Acc>(sum[n] * alpha);
    }
    return;
  }
  const typename N::Word* x = a.data;
  const int run = kAdd ? depth : run_of<N>(depth);
  for (int start = 0; start < depth; start += run) {
    const int end = depth - start <= run ? depth : start + run;
    Vec<Acc> sum[kStrip][Span];
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < Span; ++n) sum[r][n] = kAdd ? load<Acc>(c + r * c_row + n * kW) : Vec<Acc>{};
    }
    for (int k = start; k < end; ++k, x += a.step, b += b_step) {
      Vec<typename N::Word> column[Span];
#pragma GCC unroll 4
      for (int n = 0; n < Span; ++n) column[n] = load<typename N::Word>(b + n * kW);
#pragma GCC unroll 4
      for (int r = 0; r < kStrip; ++r) {
        const Vec<typename N::Word> scalar = broadcast(x[r * a.row]);
#pragma GCC unroll 4
        for (int n = 0; n < Span; ++n) sum[r][n] = multiply_add<N>(scalar, column[n], sum[r][n]);
      }
    }
    const Acc factor = end == depth ? alpha : 1;
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
#pragma GCC unroll 4
      for (int n = 0; n < Span; ++n) {
        Acc* at = c + r * c_row + n * kW;
        if (!kAdd && start > 0) sum[r][n] += load<Acc>(at);
        store<Acc>(at, kAdd ? sum[r][n] : sum[r][n] * factor);
      }
    }
  }
}

// The same for any number of vectors.
template <class N, bool kAdd>
CHARGPT_INLINE void strip(int vectors, int depth, A<N> a, B<N> b, typename N::Acc* c, int64_t c_row,
                          typename N::Acc alpha = 1) {
  for (; vectors >= kSpan; vectors -= kSpan) {
    strip_of<N, kSpan, kAdd>(depth, a, b.data, b.step, c, c_row, alpha);
    b.data += b.panel;
    c += kSpan * kLanes<typename N::Acc>;
  }
  if (vectors == 1) strip_of<N, 1, kAdd>(depth, a, b.data, b.step, c, c_row, alpha);
  if constexpr (kSpan > 2) {
    if (vectors == 2) strip_of<N, 2, kAdd>(depth, a, b.data, b.step, c, c_row, alpha);
    if (vectors == 3) strip_of<N, 3, kAdd>(depth, a, b.data, b.step, c, c_row, alpha);
  }
}

// ---- Storage to words and back -------------------------------------------------------------------------------------

// A vector of words from a row; `left` elements remain in it, and zeros follow.
template <class N>
CHARGPT_INLINE Vec<typename N::Word> load_words(const typename N::Storage* p, int left) {
  using Word = typename N::Word;
  if constexpr (N::kPair == 2) {
#if CHARGPT_ISA_LEVEL >= 3
    if (left < 2 * kLanes<Word>) return (Vec<Word>)_mm512_maskz_loadu_epi16((1u << left) - 1, p);
#endif
    return load<Word>(p);
  } else if constexpr (std::is_same_v<N, BFloat16Widened>) {
    return widen(load_half(p, left));
  } else {
    return left >= kLanes<Word> ? load<Word>(p) : load_first<Word>(p, left);
  }
}

// A vector of elements of a row as accumulators, likewise.
template <class N>
CHARGPT_INLINE Vec<typename N::Acc> load_row(const typename N::Storage* p, int left) {
  using Acc = typename N::Acc;
  if constexpr (std::is_same_v<typename N::Storage, uint16_t>) {
    return widen(load_half(p, left));
  } else {
    return left >= kLanes<Acc> ? load<Acc>(p) : load_first<Acc>(p, left);
  }
}

template <class N>
CHARGPT_INLINE void store_row(typename N::Storage* p, Vec<typename N::Acc> x, int left) {
  using Acc = typename N::Acc;
  if constexpr (std::is_same_v<typename N::Storage, uint16_t>) {
    store_half(p, narrow(x), left);
  } else if (left >= kLanes<Acc>) {
    store<Acc>(p, x);
  } else {
    store_first<Acc>(p, x, left);
  }
}

// Two rows of elements as words that pair them: what the contraction over rows needs.
#if CHARGPT_ISA_LEVEL >= 3
CHARGPT_INLINE Vec<int32_t> pair_up(__m512i low_and_high) {  // x0 … x15 y0 … y15 -> x0 y0 x1 y1 …
  const __m512i order = (__m512i)(Vec<int32_t>)(iota<float>() * 0x10001 + 0x100000);
  return (Vec<int32_t>)_mm512_permutexvar_epi16(order, low_and_high);
}
#endif

// rows x D elements -> rows of words, for the A operand of Q Kᵀ and dO Vᵀ.
template <class N>
void pack_rows(const Layout<N>& layout, const typename N::Storage* x, int64_t stride, int rows,
               typename N::Word* packed) {
  constexpr int kElements = kLanes<typename N::Word> * N::kPair;
  for (int r = 0; r < rows; ++r, x += stride, packed += layout.pitch) {
    for (int d = 0; d < layout.D; d += kElements) {
      store<typename N::Word>(packed + d / N::kPair, load_words<N>(x + d, layout.D - d));
    }
  }
}

// rows ≤ 64 x D elements -> tile[panel][word of D][row]: the B operand of Q Kᵀ and dO Vᵀ. Missing rows become zeros.
template <class N>
void pack_turned(const Layout<N>& layout, const typename N::Storage* x, int64_t stride, int rows,
                 typename N::Word* tile) {
  using Word = typename N::Word;
  constexpr int kW = kLanes<Word>, kPanel = kSpan * kW;
  for (int r = 0; r < rows; r += kW) {
    Word* panel = tile + r / kPanel * layout.turned_panel() + r % kPanel;
    for (int word = 0; word < layout.depth; word += kW) {
      const int d = word * N::kPair;
      Vec<Word> square[kW];
#pragma GCC unroll 16
      for (int i = 0; i < kW; ++i) {
        square[i] = r + i < rows ? load_words<N>(x + (r + i) * stride + d, layout.D - d) : Vec<Word>{};
      }
      transpose<Word>(square);
      const int count = layout.depth - word < kW ? layout.depth - word : kW;
      for (int i = 0; i < count; ++i) store<Word>(panel + (word + i) * kPanel, square[i]);
    }
  }
}

// rows ≤ 64 x D elements -> tile[panel][row / kPair][column]: the B operand where rows are contracted. With pairs, a
// missing last row becomes zeros.
template <class N>
void pack_paired(const Layout<N>& layout, const typename N::Storage* x, int64_t stride, int rows,
                 typename N::Word* tile) {
  using Word = typename N::Word;
  constexpr int kW = kLanes<Word>;
  for (int d = 0; d < layout.D; d += kW) {
    const int left = layout.D - d;
    Word* panel = tile + d / layout.width * layout.rows_panel() + d % layout.width;
    for (int r = 0; r < rows; r += N::kPair, panel += layout.width) {
      const typename N::Storage* row = x + r * stride + d;
      if constexpr (N::kPair == 2) {
#if CHARGPT_ISA_LEVEL >= 3
        const __m256i low = (__m256i)load_half(row, left);
        const __m256i high = r + 1 < rows ? (__m256i)load_half(row + stride, left) : _mm256_setzero_si256();
        store<Word>(panel, pair_up(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1)));
#endif
      } else {
        store<Word>(panel, load_words<N>(row, left));
      }
    }
  }
}

// ---- Scratch -------------------------------------------------------------------------------------------------------

// Hands out pieces of one allocation, or only measures it where base is nullptr.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base + used);
    used += round_up(count * sizeof(T), 64);
    return base == nullptr ? nullptr : piece;
  }
};

// ---- Shared by both directions -------------------------------------------------------------------------------------

template <class T>
CHARGPT_INLINE T* row_of(const View& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(const_cast<void*>(x.data)) + b * x.batch_stride + h * x.head_stride + t * x.time_stride;
}
template <class T>
CHARGPT_INLINE T* row_of(const MutableView& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.batch_stride + h * x.head_stride + t * x.time_stride;
}

// Query i sees the keys in [first_key(i), end_key(i)).
CHARGPT_INLINE int64_t end_key(const AttentionShape& shape, int64_t i) { return shape.S - shape.T + i + 1; }
CHARGPT_INLINE int64_t first_key(const AttentionShape& shape, const AttentionOptions& options, int64_t i) {
  const int64_t end = end_key(shape, i);
  return options.window > 0 && options.window < end ? end - options.window : 0;
}

// Rows of a head are far apart in (B, T, H, D) memory, which hardware does not foresee; fetching the rows of the next
// block during the products of this one saves 10 to 20 % of the time (T = 256, D = 64).
template <class N, bool kWrite = false, class AnyView>
CHARGPT_INLINE void prefetch_rows(const AnyView& x, int64_t D, int64_t b, int64_t h, int64_t t, int rows) {
  for (int r = 0; r < rows; ++r) {
    const char* row = reinterpret_cast<const char*>(row_of<typename N::Storage>(x, b, h, t + r));
    for (size_t at = 0; at < D * sizeof(typename N::Storage); at += 64) __builtin_prefetch(row + at, kWrite, 2);
  }
}

// 64 queries of one head, the unit of work
struct Block {
  int64_t b, h, q0;
};

struct Dropout {
  bool on;
  uint32_t threshold;  // weights with a smaller random word are dropped
  double grow;         // factor on the others

  explicit Dropout(const AttentionOptions& options)
      : on(options.dropout),
        threshold(options.dropout ? static_cast<uint32_t>(std::floor(options.dropout_p * 4294967296.0)) : 0),
        grow(options.dropout ? 1.0 / (1.0 - options.dropout_p) : 1.0) {}
};

// x where the random word says keep, else 0
template <class Acc>
CHARGPT_INLINE Vec<Acc> drop(Vec<Acc> x, const uint32_t* words, uint32_t threshold) {
  if constexpr (sizeof(Acc) == 4) {
    return load<uint32_t>(words) >= threshold ? x : Vec<Acc>{};
  } else {
    Vec<uint64_t> wide;
    for (int i = 0; i < kLanes<Acc>; ++i) wide[i] = words[i];
    return wide >= threshold ? x : Vec<Acc>{};
  }
}

// x in the lanes of [low, high), else `other`; the first lane is `position`
template <class Acc>
CHARGPT_INLINE Vec<Acc> within(Vec<Acc> x, int position, int low, int high, Vec<Acc> other) {
  const Vec<IntOf<Acc>> lane = iota<Acc>() + static_cast<IntOf<Acc>>(position);
  return (lane >= low) & (lane < high) ? x : other;
}

// ---- Forward -------------------------------------------------------------------------------------------------------

template <class N>
struct ForwardScratch {
  typename N::Word *k, *v, *q;  // k and v: all tiles of one head; q: one tile of rows
  uint8_t* packed;              // which tiles of k and v are
  typename N::Acc *s, *o;       // (64, 256), (64, columns)
  typename N::Acc *m, *l;       // (64)
  uint32_t* words;              // random words of four rows

  ForwardScratch(Arena& arena, const AttentionShape& shape, const Layout<N>& layout) {
    const int64_t tiles = (shape.S + kTile - 1) / kTile;
    k = arena.take<typename N::Word>(tiles * layout.turned_tile());
    v = arena.take<typename N::Word>(tiles * layout.rows_tile());
    q = arena.take<typename N::Word>(int64_t{kTile} * layout.pitch);
    packed = arena.take<uint8_t>(tiles);
    s = arena.take<typename N::Acc>(int64_t{kTile} * kChunkPitch);
    o = arena.take<typename N::Acc>(int64_t{kTile} * layout.columns);
    m = arena.take<typename N::Acc>(kTile);
    l = arena.take<typename N::Acc>(kTile);
    words = arena.take<uint32_t>(kStrip * kChunk);
  }
};

// The keys of one chunk or tile that each of four queries sees, [low, high), and those that all or any of them see.
// Four at a time, for the processor works on them side by side.
struct Strip {
  int low[kStrip], high[kStrip];
  int inner_low, inner_high;  // all see
  int outer_low, outer_high;  // any sees

  // Queries from i on, of which `rows` exist; the others see nothing.
  CHARGPT_INLINE Strip(const AttentionShape& shape, const AttentionOptions& options, int64_t i, int rows, int64_t first,
                       int keys) {
    inner_low = outer_high = 0;
    inner_high = outer_low = keys;
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
      low[r] = r < rows ? clamp(first_key(shape, options, i + r) - first, 0, keys) : 0;
      high[r] = r < rows ? clamp(end_key(shape, i + r) - first, 0, keys) : 0;
      if (low[r] > inner_low) inner_low = low[r];
      if (low[r] < outer_low) outer_low = low[r];
      if (high[r] < inner_high) inner_high = high[r];
      if (high[r] > outer_high) outer_high = high[r];
    }
  }

  CHARGPT_INLINE bool crosses(int j, int lanes) const { return j < inner_low || j + lanes > inner_high; }
};

// e^x, as exact as what is done with it needs
template <class N>
CHARGPT_INLINE Vec<typename N::Acc> exponential_for(Vec<typename N::Acc> x) {
#if CHARGPT_ISA_LEVEL >= 3
  if constexpr (N::kPair == 2) return coarse_exponential(x);
#endif
  if constexpr (N::kPair == 1) return exponential(x);
}

// Four rows of S become P = exp(S - m), in the layout that P V reads; keys that a query does not see get 0, up to the
// last vector that any of the four needs. shrink = exp(m_old - m) is the factor on what was summed before.
template <class N>
CHARGPT_INLINE void softmax_strip(typename N::Acc* s, const Strip& seen, const uint32_t* words, uint32_t threshold,
                                  typename N::Acc* m, typename N::Acc* l, typename N::Acc* shrink) {
  using Acc = typename N::Acc;
  constexpr int kW = kLanes<Acc>;
  constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();
  const int begin = seen.outer_low / kW * kW;
  Vec<Acc> top[kStrip], sum[kStrip];
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
    top[r] = broadcast(kNothing);
    sum[r] = Vec<Acc>{};
  }
  for (int j = begin; j < seen.outer_high; j += kW) {
    const bool crosses = seen.crosses(j, kW);
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
      Vec<Acc> x = load<Acc>(s + r * kChunkPitch + j);
      if (crosses) x = within<Acc>(x, j, seen.low[r], seen.high[r], broadcast(kNothing));
      top[r] = maximum<Acc>(top[r], x);
    }
  }
  Acc highest[kStrip];
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
    const Acc chunk_top = maximum_of<Acc>(top[r]);
    highest[r] = chunk_top > m[r] ? chunk_top : m[r];
  }
  for (int j = 0; j < seen.outer_high; j += kW) {
    const bool crosses = seen.crosses(j, kW);
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
      Acc* row = s + r * kChunkPitch;
      Vec<Acc> p{};
      if (j >= begin) {
        p = exponential_for<N>(load<Acc>(row + j) - highest[r]);
        if (crosses) p = within<Acc>(p, j, seen.low[r], seen.high[r], Vec<Acc>{});
        sum[r] += p;
        if (words != nullptr) p = drop<Acc>(p, words + r * kChunk + j, threshold);
      }
      if constexpr (N::kPair == 2) {
        store_half(reinterpret_cast<uint16_t*>(row) + j, narrow(p), kW);  // behind what is still to be read
      } else {
        store<Acc>(row + j, p);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kStrip; ++r) {
    shrink[r] = highest[r] == m[r] ? 1 : m[r] == kNothing ? 0 : exponential(broadcast(m[r] - highest[r]))[0];
    l[r] = l[r] * shrink[r] + sum_of<Acc>(sum[r]);
    m[r] = highest[r];
  }
}

template <class N>
void forward_block(const ForwardCall& call, const Layout<N>& layout, const ForwardScratch<N>& scratch, Block block,
                   Block next) {
  using Acc = typename N::Acc;
  using Word = typename N::Word;
  using Storage = typename N::Storage;
  constexpr int kW = kLanes<Acc>;
  const AttentionShape& shape = call.shape;
  const Dropout dropout(call.options);
  const auto [b, h, q0] = block;
  const int64_t h_kv = h / (shape.H / shape.H_kv);
  const int rows = clamp(shape.T - q0, 0, kTile);
  const int64_t first = first_key(shape, call.options, q0) / kTile * kTile, end = end_key(shape, q0 + rows - 1);

  const int64_t next_head = (b * shape.H_kv + h_kv + 1) % (shape.B * shape.H_kv);
  for (int64_t t = first / kTile; t * kTile < end; ++t) {
    if (scratch.packed[t]) continue;
    scratch.packed[t] = 1;
    const int keys = clamp(shape.S - t * kTile, 0, kTile);
    pack_turned<N>(layout, row_of<Storage>(call.k, b, h_kv, t * kTile), call.k.time_stride, keys,
                   scratch.k + t * layout.turned_tile());
    pack_paired<N>(layout, row_of<Storage>(call.v, b, h_kv, t * kTile), call.v.time_stride, keys,
                   scratch.v + t * layout.rows_tile());
  }
  pack_rows<N>(layout, row_of<Storage>(call.q, b, h, q0), call.q.time_stride, rows, scratch.q);
  for (int r = 0; r < kTile; ++r) {
    scratch.m[r] = -std::numeric_limits<Acc>::infinity();
    scratch.l[r] = 0;
  }
  std::memset(scratch.o, 0, sizeof(Acc) * kTile * layout.columns);

  for (int64_t chunk = first; chunk < end; chunk += kChunk) {
    const int keys = clamp(end - chunk, 0, kChunk);
    // S = scale · Q Kᵀ
    for (int j = 0; j < keys; j += kTile) {
      const B<N> k{scratch.k + (chunk + j) / kTile * layout.turned_tile(), kSpan * kW, layout.turned_panel()};
      for (int r = 0; r < rows; r += kStrip) {
        const int last = r + kStrip <= rows ? r + kStrip - 1 : rows - 1;
        const int needed = clamp(end_key(shape, q0 + last) - chunk - j, 0, kTile);
        strip<N, false>((needed + kW - 1) / kW, layout.depth, A<N>{scratch.q + r * layout.pitch, layout.pitch, 1}, k,
                        scratch.s + r * kChunkPitch + j, kChunkPitch, static_cast<Acc>(call.options.scale));
        if (chunk == first && j == 0) {
          prefetch_rows<N, true>(call.out, shape.D, b, h, q0 + r, last - r + 1);
          prefetch_rows<N>(call.q, shape.D, next.b, next.h, next.q0 + r, kStrip);
        }
      }
    }
    // P = exp(S - m)
    for (int r = 0; r < rows; r += kStrip) {
      const Strip seen(shape, call.options, q0 + r, rows - r, chunk, keys);
      for (int i = 0; dropout.on && i < kStrip && r + i < rows; ++i) {
        random_words(call.options.seed, static_cast<uint32_t>(b * shape.H + h),
                     static_cast<uint32_t>(shape.S - shape.T + q0 + r + i), static_cast<uint32_t>(chunk), seen.high[i],
                     scratch.words + i * kChunk);
      }
      if (chunk == first) {
        const int64_t t = shape.S - shape.T + q0 + r;
        prefetch_rows<N>(call.k, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
        prefetch_rows<N>(call.v, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
      }
      Acc shrink[kStrip];
      softmax_strip<N>(scratch.s + r * kChunkPitch, seen, dropout.on ? scratch.words : nullptr, dropout.threshold,
                       scratch.m + r, scratch.l + r, shrink);
      if (chunk == first) continue;
      for (int i = 0; i < kStrip; ++i) {
        Acc* o = scratch.o + (r + i) * layout.columns;
        for (int d = 0; d < layout.columns; d += kW) store<Acc>(o + d, load<Acc>(o + d) * shrink[i]);
      }
    }
    // O += P V
    for (int j = 0; j < keys; j += kTile) {
      const B<N> v{scratch.v + (chunk + j) / kTile * layout.rows_tile(), layout.width, layout.rows_panel()};
      for (int r = 0; r < rows; r += kStrip) {
        const int last = r + kStrip <= rows ? r + kStrip - 1 : rows - 1;
        const int needed = clamp(end_key(shape, q0 + last) - chunk - j, 0, kTile);
        const Word* p = reinterpret_cast<const Word*>(scratch.s + r * kChunkPitch) + j / N::kPair;
        strip<N, true>(needed > 0 ? layout.columns / kW : 0, (needed + N::kPair - 1) / N::kPair,
                       A<N>{p, kChunkPitch, 1}, v, scratch.o + r * layout.columns, layout.columns);
      }
    }
  }

  Acc* lse = static_cast<Acc*>(call.lse) + (b * shape.H + h) * shape.T + q0;
  for (int r = 0; r < rows; ++r) {
    const Acc factor = static_cast<Acc>(dropout.grow) / scratch.l[r];
    const Acc* o = scratch.o + r * layout.columns;
    Storage* out = row_of<Storage>(call.out, b, h, q0 + r);
    for (int d = 0; d < layout.D; d += kW) store_row<N>(out + d, load<Acc>(o + d) * factor, layout.D - d);
    lse[r] = scratch.m[r] + std::log(scratch.l[r]);
  }
}

// The blocks of a head in the order last, first, last but one, second, …, and head after head. An item of work is two of
// them, so that items cost the same.
inline Block forward_block_at(const AttentionShape& shape, int64_t index) {
  const int64_t blocks = blocks_of(shape), head = index / blocks, i = index % blocks;
  return {head / shape.H, head % shape.H, (i % 2 == 0 ? blocks - 1 - i / 2 : i / 2) * kTile};
}

template <class N>
void forward_items(void* context, int64_t begin, int64_t end) {
  const ForwardCall& call = *static_cast<const ForwardCall*>(context);
  const AttentionShape& shape = call.shape;
  const Layout<N> layout(shape.D);
  Arena measure{nullptr};
  ForwardScratch<N>(measure, shape, layout);
  Arena arena{static_cast<char*>(std::aligned_alloc(64, measure.used))};
  if (arena.base == nullptr) {
    call.out_of_memory->store(true);
    return;
  }
  const ForwardScratch<N> scratch(arena, shape, layout);
  const int64_t blocks = blocks_of(shape), pairs = (blocks + 1) / 2;
  const int64_t stop = end / pairs * blocks + end % pairs * 2, total = shape.B * shape.H * blocks;
  int64_t packed_head = -1;
  for (int64_t index = begin / pairs * blocks + begin % pairs * 2; index < stop; ++index) {
    const Block block = forward_block_at(shape, index);
    const int64_t kv_head = block.b * shape.H_kv + block.h / (shape.H / shape.H_kv);
    if (kv_head != packed_head) std::memset(scratch.packed, 0, (shape.S + kTile - 1) / kTile);
    packed_head = kv_head;
    forward_block<N>(call, layout, scratch, block, forward_block_at(shape, (index + 1) % total));
  }
  std::free(arena.base);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

template <class N>
struct BackwardScratch {
  typename N::Word *k_turned, *k_paired, *v_turned;          // all tiles of one head
  typename N::Acc *dk, *dv;                                  // (S in whole tiles, columns), unless the work is split
  uint8_t* packed;                                           // which tiles of k and v are
  typename N::Word *q_rows, *q_paired, *do_rows, *do_paired;  // one tile
  typename N::Acc *s, *dp, *dq;                              // (64, 64), (64, 64), (64, columns)
  typename N::Word *p_paired, *ds_paired, *ds_rows;          // P and dS as operands; for kPair = 1 these are s and dp
  typename N::Acc *lse, *dlse, *delta;                       // (64)
  uint32_t* words;                                           // random words of four rows

  BackwardScratch(Arena& arena, const AttentionShape& shape, const Layout<N>& layout, bool split) {
    using Word = typename N::Word;
    using Acc = typename N::Acc;
    const int64_t tiles = (shape.S + kTile - 1) / kTile;
    k_turned = arena.take<Word>(tiles * layout.turned_tile());
    k_paired = arena.take<Word>(tiles * layout.rows_tile());
    v_turned = arena.take<Word>(tiles * layout.turned_tile());
    dk = arena.take<Acc>(split ? 0 : tiles * kTile * layout.columns);
    dv = arena.take<Acc>(split ? 0 : tiles * kTile * layout.columns);
    packed = arena.take<uint8_t>(tiles);
    q_rows = arena.take<Word>(int64_t{kTile} * layout.pitch);
    do_rows = arena.take<Word>(int64_t{kTile} * layout.pitch);
    q_paired = arena.take<Word>(layout.rows_tile());
    do_paired = arena.take<Word>(layout.rows_tile());
    s = arena.take<Acc>(kTile * kTile);
    dp = arena.take<Acc>(kTile * kTile);
    dq = arena.take<Acc>(int64_t{kTile} * layout.columns);
    if constexpr (N::kPair == 1) {
      p_paired = s;
      ds_paired = ds_rows = dp;
    } else {
      p_paired = arena.take<Word>(kTile * kTile / N::kPair);
      ds_paired = arena.take<Word>(kTile * kTile / N::kPair);
      ds_rows = arena.take<Word>(kTile * kTile / N::kPair);
    }
    lse = arena.take<Acc>(kTile);
    dlse = arena.take<Acc>(kTile);
    delta = arena.take<Acc>(kTile);
    words = arena.take<uint32_t>(kStrip * kTile);
  }
};

// The 64 x 64 tile of P and dS from S and dP, as operands of the last three products.
template <class N>
void weights_tile(const BackwardCall& call, const BackwardScratch<N>& scratch, const Dropout& dropout, int64_t bh,
                  int64_t q0, int rows, int64_t k0) {
  using Acc = typename N::Acc;
  constexpr int kW = kLanes<Acc>;
  for (int r = 0; r < rows; r += kStrip) {
    const Strip seen(call.shape, call.options, q0 + r, rows - r, k0, kTile);
    for (int i = 0; dropout.on && i < kStrip && r + i < rows; ++i) {
      random_words(call.options.seed, static_cast<uint32_t>(bh),
                   static_cast<uint32_t>(call.shape.S - call.shape.T + q0 + r + i), static_cast<uint32_t>(k0),
                   seen.high[i], scratch.words + i * kTile);
    }
    for (int j = 0; j < kTile; j += kW) {
      const bool crosses = seen.crosses(j, kW), used = j < seen.outer_high;
      Vec<Acc> p[kStrip], ds[kStrip];
#pragma GCC unroll 4
      for (int i = 0; i < kStrip; ++i) {
        p[i] = ds[i] = Vec<Acc>{};
        if (!used) continue;
        const int at = (r + i) * kTile + j;
        p[i] = exponential_for<N>(load<Acc>(scratch.s + at) - scratch.lse[r + i]);
        Vec<Acc> dp = load<Acc>(scratch.dp + at);
        if (dropout.on) dp = drop<Acc>(dp, scratch.words + i * kTile + j, dropout.threshold);
        ds[i] = p[i] * (dp - scratch.delta[r + i] + scratch.dlse[r + i]);  // d lse / d S is P
        if (dropout.on) p[i] = drop<Acc>(p[i], scratch.words + i * kTile + j, dropout.threshold);
        if (crosses) {
          p[i] = within<Acc>(p[i], j, seen.low[i], seen.high[i], Vec<Acc>{});
          ds[i] = within<Acc>(ds[i], j, seen.low[i], seen.high[i], Vec<Acc>{});
        }
      }
#pragma GCC unroll 4
      for (int i = 0; i < kStrip; i += N::kPair) {
        if constexpr (N::kPair == 1) {
          store<Acc>(scratch.s + (r + i) * kTile + j, p[i]);
          store<Acc>(scratch.dp + (r + i) * kTile + j, ds[i]);
        } else {
#if CHARGPT_ISA_LEVEL >= 3
          const __m512i p_halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)p[i + 1], (__m512)p[i]);
          const __m512i ds_halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)ds[i + 1], (__m512)ds[i]);
          store<int32_t>(scratch.p_paired + (r + i) / 2 * kTile + j, pair_up(p_halves));
          store<int32_t>(scratch.ds_paired + (r + i) / 2 * kTile + j, pair_up(ds_halves));
          int32_t* row = scratch.ds_rows + (r + i) * (kTile / 2) + j / 2;
          _mm256_storeu_si256((__m256i*)row, _mm512_castsi512_si256(ds_halves));
          _mm256_storeu_si256((__m256i*)(row + kTile / 2), _mm512_extracti64x4_epi64(ds_halves, 1));
#endif
        }
      }
    }
  }
}

// rowsum(dO ∘ O). In float32 it is summed as dP = dO Vᵀ is, so that dP - rowsum cancels as well as it can:
// exactly, for a query that sees one key.
template <class N>
void row_products(const Layout<N>& layout, const typename N::Storage* x, int64_t x_stride,
                  const typename N::Storage* y, int64_t y_stride, int rows, typename N::Acc* products) {
  using Acc = typename N::Acc;
  constexpr int kW = kLanes<Acc>;
  if constexpr (N::kPair == 1) {
    for (int r = 0; r < rows; r += kW) {
      const int length = run_of<N>(layout.depth);
      Vec<Acc> sum{}, run{};
      double doubles[kW] = {};
      for (int d = 0; d < layout.D; d += kW) {
        const int left = layout.D - d;
        Vec<Acc> a[kW], b[kW];
        for (int i = 0; i < kW; ++i) {
          a[i] = r + i < rows ? load_row<N>(x + (r + i) * x_stride + d, left) : Vec<Acc>{};
          b[i] = r + i < rows ? load_row<N>(y + (r + i) * y_stride + d, left) : Vec<Acc>{};
        }
        transpose<Acc>(a);
        transpose<Acc>(b);
        if constexpr (kSumsInDouble<N>) {
          for (int i = 0; i < kW; ++i) {
            for (int n = 0; n < kW; ++n) doubles[n] += static_cast<double>(a[i][n]) * b[i][n];
          }
          continue;
        }
        for (int i = 0; i < kW; ++i) run = a[i] * b[i] + run;
        if ((d + kW) % length == 0 || left <= kW) {
          sum = d < length ? run : run + sum;
          run = Vec<Acc>{};
        }
      }
      if constexpr (kSumsInDouble<N>) {
        for (int n = 0; n < kW; ++n) sum[n] = static_cast<Acc>(doubles[n]);
      }
      store<Acc>(products + r, sum);
    }
  } else {
    for (int r = 0; r < rows; ++r) {
      Vec<Acc> sum{};
      for (int d = 0; d < layout.D; d += kW) {
        sum += load_row<N>(x + r * x_stride + d, layout.D - d) * load_row<N>(y + r * y_stride + d, layout.D - d);
      }
      products[r] = sum_of<Acc>(sum);
    }
  }
}

// Everything that 64 queries contribute: writes their dq, adds to dk and dv.
template <class N>
void backward_block(const BackwardCall& call, const Layout<N>& layout, const BackwardScratch<N>& scratch,
                    typename N::Acc* dk, typename N::Acc* dv, Block block, Block next) {
  using Acc = typename N::Acc;
  using Storage = typename N::Storage;
  constexpr int kW = kLanes<Acc>;
  const AttentionShape& shape = call.shape;
  const Dropout dropout(call.options);
  const auto [b, h, q0] = block;
  const int64_t bh = b * shape.H + h, h_kv = h / (shape.H / shape.H_kv);
  const int rows = clamp(shape.T - q0, 0, kTile), vectors = layout.columns / kW;
  const int64_t first = first_key(shape, call.options, q0) / kTile * kTile, end = end_key(shape, q0 + rows - 1);

  const int64_t next_head = (b * shape.H_kv + h_kv + 1) % (shape.B * shape.H_kv);
  for (int64_t t = first / kTile; t * kTile < end; ++t) {
    if (scratch.packed[t]) continue;
    scratch.packed[t] = 1;
    const int keys = clamp(shape.S - t * kTile, 0, kTile);
    const Storage* k = row_of<Storage>(call.k, b, h_kv, t * kTile);
    pack_turned<N>(layout, k, call.k.time_stride, keys, scratch.k_turned + t * layout.turned_tile());
    pack_paired<N>(layout, k, call.k.time_stride, keys, scratch.k_paired + t * layout.rows_tile());
    pack_turned<N>(layout, row_of<Storage>(call.v, b, h_kv, t * kTile), call.v.time_stride, keys,
                   scratch.v_turned + t * layout.turned_tile());
  }
  const Storage* q = row_of<Storage>(call.q, b, h, q0);
  const Storage* dout = row_of<Storage>(call.dout, b, h, q0);
  pack_rows<N>(layout, q, call.q.time_stride, rows, scratch.q_rows);
  pack_paired<N>(layout, q, call.q.time_stride, rows, scratch.q_paired);
  pack_rows<N>(layout, dout, call.dout.time_stride, rows, scratch.do_rows);
  pack_paired<N>(layout, dout, call.dout.time_stride, rows, scratch.do_paired);
  const Storage* out = row_of<Storage>(call.out, b, h, q0);
  row_products<N>(layout, dout, call.dout.time_stride, out, call.out.time_stride, rows, scratch.delta);
  const int64_t row = bh * shape.T + q0;
  std::memcpy(scratch.lse, static_cast<const Acc*>(call.lse) + row, sizeof(Acc) * rows);
  std::memset(scratch.dlse, 0, sizeof(Acc) * rows);
  if (call.dlse != nullptr) std::memcpy(scratch.dlse, static_cast<const Acc*>(call.dlse) + row, sizeof(Acc) * rows);
  std::memset(scratch.dq, 0, sizeof(Acc) * kTile * layout.columns);

  for (int64_t k0 = first; k0 < end; k0 += kTile) {
    const int64_t t = k0 / kTile;
    const B<N> k_turned{scratch.k_turned + t * layout.turned_tile(), kSpan * kW, layout.turned_panel()};
    const B<N> v_turned{scratch.v_turned + t * layout.turned_tile(), kSpan * kW, layout.turned_panel()};
    const B<N> k_paired{scratch.k_paired + t * layout.rows_tile(), layout.width, layout.rows_panel()};
    // S = scale · Q Kᵀ
    for (int r = 0; r < rows; r += kStrip) {
      const int last = r + kStrip <= rows ? r + kStrip - 1 : rows - 1;
      const int needed = (clamp(end_key(shape, q0 + last) - k0, 0, kTile) + kW - 1) / kW;
      strip<N, false>(needed, layout.depth, A<N>{scratch.q_rows + r * layout.pitch, layout.pitch, 1}, k_turned,
                      scratch.s + r * kTile, kTile, static_cast<Acc>(call.options.scale));
      if (k0 == first) {
        prefetch_rows<N>(call.q, shape.D, next.b, next.h, next.q0 + r, kStrip);
        prefetch_rows<N>(call.dout, shape.D, next.b, next.h, next.q0 + r, kStrip);
        prefetch_rows<N>(call.out, shape.D, next.b, next.h, next.q0 + r, kStrip);
      }
    }
    // dP = dO Vᵀ
    for (int r = 0; r < rows; r += kStrip) {
      const int last = r + kStrip <= rows ? r + kStrip - 1 : rows - 1;
      const int needed = (clamp(end_key(shape, q0 + last) - k0, 0, kTile) + kW - 1) / kW;
      strip<N, false>(needed, layout.depth, A<N>{scratch.do_rows + r * layout.pitch, layout.pitch, 1}, v_turned,
                      scratch.dp + r * kTile, kTile, static_cast<Acc>(dropout.grow));
      if (k0 == first) {
        const int64_t t = shape.S - shape.T + q0 + r;
        prefetch_rows<N>(call.k, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
        prefetch_rows<N>(call.v, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
      }
    }
    weights_tile<N>(call, scratch, dropout, bh, q0, rows, k0);
    // dQ += dS K
    for (int r = 0; r < rows; r += kStrip) {
      const int last = r + kStrip <= rows ? r + kStrip - 1 : rows - 1;
      const int needed = clamp(end_key(shape, q0 + last) - k0, 0, kTile);
      strip<N, true>(needed > 0 ? vectors : 0, (needed + N::kPair - 1) / N::kPair,
                     A<N>{scratch.ds_rows + r * (kTile / N::kPair), kTile / N::kPair, 1}, k_paired,
                     scratch.dq + r * layout.columns, layout.columns);
      if (k0 == first) prefetch_rows<N, true>(call.dq, shape.D, b, h, q0 + r, last - r + 1);
    }
    // dV += Pᵀ dO and dK += dSᵀ Q, from the first query that sees any of four keys
    const int keys = clamp(end - k0, 0, kTile), steps = (rows + N::kPair - 1) / N::kPair;
    for (int j = 0; j < keys; j += kStrip) {
      const int start = clamp(k0 + j - (shape.S - shape.T) - q0, 0, rows - 1) / N::kPair;
      const B<N> dout_paired{scratch.do_paired + start * layout.width, layout.width, layout.rows_panel()};
      strip<N, true>(vectors, steps - start, A<N>{scratch.p_paired + start * kTile + j, 1, kTile}, dout_paired,
                     dv + (k0 + j) * layout.columns, layout.columns);
    }
    for (int j = 0; j < keys; j += kStrip) {
      const int start = clamp(k0 + j - (shape.S - shape.T) - q0, 0, rows - 1) / N::kPair;
      const B<N> q_paired{scratch.q_paired + start * layout.width, layout.width, layout.rows_panel()};
      strip<N, true>(vectors, steps - start, A<N>{scratch.ds_paired + start * kTile + j, 1, kTile}, q_paired,
                     dk + (k0 + j) * layout.columns, layout.columns);
    }
  }

  for (int r = 0; r < rows; ++r) {
    Storage* dq = row_of<Storage>(call.dq, b, h, q0 + r);
    const Acc* from = scratch.dq + r * layout.columns;
    for (int d = 0; d < layout.D; d += kW) {
      store_row<N>(dq + d, load<Acc>(from + d) * static_cast<Acc>(call.options.scale), layout.D - d);
    }
  }
}

// The sum of `parts` float arrays (S in whole tiles, columns), `part` apart, times factor, over the keys [begin, end).
template <class N>
void write_keys(const Layout<N>& layout, const typename N::Acc* from, int64_t parts, int64_t part,
                typename N::Acc factor, const MutableView& to, int64_t b, int64_t h, int64_t begin, int64_t end) {
  using Acc = typename N::Acc;
  for (int64_t s = begin; s < end; ++s) {
    prefetch_rows<N, true>(to, layout.D, b, h, s + 16, 1);
    typename N::Storage* row = row_of<typename N::Storage>(to, b, h, s);
    for (int d = 0; d < layout.D; d += kLanes<Acc>) {
      Vec<Acc> sum = load<Acc>(from + s * layout.columns + d);
      for (int64_t i = 1; i < parts; ++i) sum += load<Acc>(from + i * part + s * layout.columns + d);
      store_row<N>(row + d, sum * factor, layout.D - d);
    }
  }
}

// An item of work is one key head, or one of the `splits` shares of it: every splits-th block of queries.
template <class N>
void backward_items(void* context, int64_t begin, int64_t end) {
  using Acc = typename N::Acc;
  const BackwardCall& call = *static_cast<const BackwardCall*>(context);
  const AttentionShape& shape = call.shape;
  const Layout<N> layout(shape.D);
  const bool split = call.splits > 1;
  Arena measure{nullptr};
  BackwardScratch<N>(measure, shape, layout, split);
  Arena arena{static_cast<char*>(std::aligned_alloc(64, measure.used))};
  if (arena.base == nullptr) {
    call.out_of_memory->store(true);
    return;
  }
  const BackwardScratch<N> scratch(arena, shape, layout, split);
  const int64_t tiles = (shape.S + kTile - 1) / kTile, keys_size = tiles * kTile * layout.columns;
  const int64_t blocks = blocks_of(shape), group = shape.H / shape.H_kv;
  int64_t packed_head = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / call.splits, b = head / shape.H_kv, h_kv = head % shape.H_kv;
    if (head != packed_head) std::memset(scratch.packed, 0, tiles);
    packed_head = head;
    Acc* dk = split ? static_cast<Acc*>(call.partial) + 2 * item * keys_size : scratch.dk;
    Acc* dv = split ? dk + keys_size : scratch.dv;
    std::memset(dk, 0, sizeof(Acc) * keys_size);
    std::memset(dv, 0, sizeof(Acc) * keys_size);
    for (int64_t i = item % call.splits; i < group * blocks; i += call.splits) {
      int64_t next_head = head, next = i + call.splits;
      if (next >= group * blocks) {
        next_head = (item + 1) / call.splits % (shape.B * shape.H_kv);
        next = (item + 1) % call.splits;
      }
      backward_block<N>(call, layout, scratch, dk, dv, {b, h_kv * group + i / blocks, i % blocks * kTile},
                        {next_head / shape.H_kv, next_head % shape.H_kv * group + next / blocks, next % blocks * kTile});
    }
    if (!split) {
      write_keys<N>(layout, dk, 1, 0, static_cast<Acc>(call.options.scale), call.dk, b, h_kv, 0, shape.S);
      write_keys<N>(layout, dv, 1, 0, static_cast<Acc>(Dropout(call.options).grow), call.dv, b, h_kv, 0, shape.S);
    }
  }
  std::free(arena.base);
}

// Adds up the shares of split heads; an item is one tile of keys.
template <class N>
void join_items(void* context, int64_t begin, int64_t end) {
  using Acc = typename N::Acc;
  const BackwardCall& call = *static_cast<const BackwardCall*>(context);
  const AttentionShape& shape = call.shape;
  const Layout<N> layout(shape.D);
  const int64_t tiles = (shape.S + kTile - 1) / kTile, keys_size = tiles * kTile * layout.columns;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / tiles, b = head / shape.H_kv, h_kv = head % shape.H_kv;
    const int64_t first = item % tiles * kTile, last = first + kTile < shape.S ? first + kTile : shape.S;
    const Acc* dk = static_cast<const Acc*>(call.partial) + 2 * head * call.splits * keys_size;
    write_keys<N>(layout, dk, call.splits, 2 * keys_size, static_cast<Acc>(call.options.scale), call.dk, b, h_kv, first,
                  last);
    write_keys<N>(layout, dk + keys_size, call.splits, 2 * keys_size, static_cast<Acc>(Dropout(call.options).grow),
                  call.dv, b, h_kv, first, last);
  }
}

// Bytes of one share's dk and dv.
template <class N>
int64_t partial_bytes(const AttentionShape& shape) {
  return 2 * round_up(shape.S, kTile) * Layout<N>(shape.D).columns * static_cast<int64_t>(sizeof(typename N::Acc));
}

template <class N>
constexpr Kernels kernels_of() {
  return {forward_items<N>, backward_items<N>, join_items<N>, partial_bytes<N>};
}

inline Kernels kernels(DType dtype) {
  if (dtype == DType::kFloat64) return kernels_of<Float64>();
  if (dtype == DType::kFloat32) return kernels_of<Float32>();
#if CHARGPT_ISA_LEVEL >= 3
  return kernels_of<BFloat16Dot>();
#else
  return kernels_of<BFloat16Widened>();
#endif
}

}  // namespace chargpt::cpu::CHARGPT_ISA
