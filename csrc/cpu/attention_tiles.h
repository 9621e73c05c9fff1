// What the forward and the backward pass of attention_kernel.h share: dtypes, the micro-kernel, packed tiles, masks.

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
  uint32_t threshold;  // weights with fewer random 16 bits are dropped
  double grow;         // factor on the others

  explicit Dropout(const AttentionOptions& options)
      : on(options.dropout),
        threshold(options.dropout ? static_cast<uint32_t>(std::floor(options.dropout_p * kDropoutUnit)) : 0),
        grow(options.dropout ? 1.0 / (1.0 - options.dropout_p) : 1.0) {}
};

// x where the random halves say keep, else 0
template <class Acc>
CHARGPT_INLINE Vec<Acc> drop(Vec<Acc> x, const uint32_t* halves, uint32_t threshold) {
  if constexpr (sizeof(Acc) == 4) {
    return load<uint32_t>(halves) >= threshold ? x : Vec<Acc>{};
  } else {
    Vec<uint64_t> wide;
    for (int i = 0; i < kLanes<Acc>; ++i) wide[i] = halves[i];
    return wide >= threshold ? x : Vec<Acc>{};
  }
}

// x in the lanes of [low, high), else `other`; the first lane is `position`
template <class Acc>
CHARGPT_INLINE Vec<Acc> within(Vec<Acc> x, int position, int low, int high, Vec<Acc> other) {
  const Vec<IntOf<Acc>> lane = iota<Acc>() + static_cast<IntOf<Acc>>(position);
  return (lane >= low) & (lane < high) ? x : other;
}

}  // namespace chargpt::cpu::CHARGPT_ISA
