// Products of packed tiles, for attention_kernel.h and product_kernel.h: dtypes, the micro-kernel, packing. Included after
// simd.h.

namespace chargpt::cpu::CHARGPT_ISA {

// How a dtype is stored, what the micro-kernel multiplies (words of kPair consecutive elements of the contracted
// dimension), what it accumulates in, and how many rows at a time.

struct Float32 {
  using Storage = float;
  using Word = float;
  using Acc = float;
  static constexpr int kPair = 1, kRows = 4;
};
struct Float64 {
  using Storage = double;
  using Word = double;
  using Acc = double;
  static constexpr int kPair = 1, kRows = 4;
};
struct BFloat16Widened {  // where the CPU has no bfloat16 dot product
  using Storage = uint16_t;
  using Word = float;
  using Acc = float;
  static constexpr int kPair = 1, kRows = 4;
};
struct BFloat16Dot {
  using Storage = uint16_t;
  using Word = int32_t;
  using Acc = float;
  static constexpr int kPair = 2, kRows = 4;
};
struct BFloat16Tiles {  // where it has a matrix unit (AMX)
  using Storage = uint16_t;
  using Word = int32_t;
  using Acc = float;
  static constexpr int kPair = 2, kRows = 32;
};
template <class N>
inline constexpr bool kTiles = std::is_same_v<N, BFloat16Tiles>;

inline constexpr int kTile = 64;    // rows and columns that are packed together
inline constexpr int kStrip = 4;    // rows of the micro-kernel in vectors, and of softmax
inline constexpr int kEdge = 16;    // of a tile of the matrix unit: rows, and words of a row
#if CHARGPT_ISA_LEVEL >= 2 || defined(__aarch64__)
inline constexpr int kSpan = 4;  // its vectors: all that the registers hold, 32 or 16
#else
inline constexpr int kSpan = 2;
#endif

CHARGPT_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
CHARGPT_INLINE int clamp(int64_t x, int low, int high) {
  return static_cast<int>(x < low ? low : x > high ? high : x);
}

// Words that hold n elements of a contracted dimension, as they are multiplied: for the matrix unit in whole tiles.
template <class N>
CHARGPT_INLINE int whole_words(int n) {
  const int words = (n + N::kPair - 1) / N::kPair;
  return kTiles<N> ? static_cast<int>(round_up(words, kEdge)) : words;
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
    if (kTiles<N>) depth = pitch;  // the matrix unit takes whole tiles; what is behind D is zeros
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
#elif defined(CHARGPT_BFLOAT16_DOT)
  if constexpr (N::kPair == 2) return (Vec<float>)vbfdotq_f32((float32x4_t)c, (bfloat16x8_t)a, (bfloat16x8_t)b);
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
inline constexpr bool kSumsInDouble = !kFuses && std::is_same_v<typename N::Acc, float>;

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

#if CHARGPT_ISA_LEVEL >= 4
// The unit's registers hold 8 tiles of 16 rows of 64 bytes. The compiler does not know what they hold; "memory" keeps it
// from moving stores over the loads of tiles.
template <int kTo>
CHARGPT_INLINE void load_tile(const void* rows, int64_t words) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(words * 4), "i"(kTo) : "memory");
}
template <int kFrom>
CHARGPT_INLINE void store_tile(void* rows, int64_t words) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(words * 4), "i"(kFrom) : "memory");
}
template <int kTo, bool kAdd>
CHARGPT_INLINE void begin_tile(const float* rows, int64_t words) {
  if constexpr (kAdd) {
    load_tile<kTo>(rows, words);
  } else {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTo));
  }
}
template <int kC, int kA, int kB>
CHARGPT_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
}

// C (32 x Span vectors) = A B, or C += A B, over `depth` words: 2 x Span tiles of C.
template <int Span, bool kAdd>
CHARGPT_INLINE void tiles_of(int depth, A<BFloat16Tiles> a, const int32_t* b, int64_t b_step, float* c, int64_t c_row) {
  float* lower = c + kEdge * c_row;
  begin_tile<0, kAdd>(c, c_row);
  begin_tile<1, kAdd>(lower, c_row);
  if constexpr (Span == 2) begin_tile<2, kAdd>(c + kEdge, c_row);
  if constexpr (Span == 2) begin_tile<3, kAdd>(lower + kEdge, c_row);
  for (int k = 0; k < depth; k += kEdge) {
    load_tile<6>(b + k * b_step, b_step);
    load_tile<4>(a.data + k, a.row);
    load_tile<5>(a.data + k + kEdge * a.row, a.row);
    multiply_tiles<0, 4, 6>();
    multiply_tiles<1, 5, 6>();
    if constexpr (Span == 2) {
      load_tile<7>(b + k * b_step + kEdge, b_step);
      multiply_tiles<2, 4, 7>();
      multiply_tiles<3, 5, 7>();
    }
  }
  store_tile<0>(c, c_row);
  store_tile<1>(lower, c_row);
  if constexpr (Span == 2) store_tile<2>(c + kEdge, c_row);
  if constexpr (Span == 2) store_tile<3>(lower + kEdge, c_row);
}
#endif

// The matrix unit's registers as this file wants them, for one thread, as long as this lives. Other libraries of the
// process (oneDNN) configure them too, and may not look again: they find theirs as they left them.
struct MatrixUnit {
#if CHARGPT_ISA_LEVEL >= 4
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {kEdge, kEdge, kEdge, kEdge, kEdge, kEdge, kEdge, kEdge};
  };
  Configuration before;

  MatrixUnit() {
    const Configuration ours;
    asm volatile("sttilecfg %0" : "=m"(before));
    asm volatile("ldtilecfg %0" : : "m"(ours));
  }
  ~MatrixUnit() { asm volatile("ldtilecfg %0" : : "m"(before)); }
  MatrixUnit(const MatrixUnit&) = delete;
#else
  MatrixUnit() {}
#endif
};

// The same for any number of vectors, and as many rows as N takes. Where those are tiles, alpha is left to `scaled`.
template <class N, bool kAdd>
CHARGPT_INLINE void strip(int vectors, int depth, A<N> a, B<N> b, typename N::Acc* c, int64_t c_row,
                          typename N::Acc alpha = 1) {
#if CHARGPT_ISA_LEVEL >= 4
  if constexpr (kTiles<N>) {
    for (int n = 0; n < vectors; n += 2) {
      const int32_t* column = b.data + n / kSpan * b.panel + n % kSpan * kEdge;
      if (n + 1 < vectors) tiles_of<2, kAdd>(depth, a, column, b.step, c + n * kEdge, c_row);
      else tiles_of<1, kAdd>(depth, a, column, b.step, c + n * kEdge, c_row);
    }
    return;
  }
#endif
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

// alpha times what `strip` left. Rounded, as the maximum of a row of S is, for S - m must be exactly 0 there.
template <class N>
CHARGPT_INLINE Vec<typename N::Acc> scaled(Vec<typename N::Acc> x, [[maybe_unused]] typename N::Acc alpha) {
#if CHARGPT_ISA_LEVEL >= 4
  if constexpr (kTiles<N>) return rounded(x * alpha);
#endif
  return x;
}

// ---- Storage to words and back -------------------------------------------------------------------------------------

// A vector of words from a row; `left` elements remain in it, and zeros follow.
template <class N>
CHARGPT_INLINE Vec<typename N::Word> load_words(const typename N::Storage* p, int left) {
  using Word = typename N::Word;
  if constexpr (N::kPair == 2) {
    constexpr int kHalves = 2 * kLanes<Word>;
    if (left >= kHalves) return load<Word>(p);
#if CHARGPT_ISA_LEVEL >= 3
    return (Vec<Word>)_mm512_maskz_loadu_epi16((1u << left) - 1, p);
#else
    Vec<Word> words{};
    __builtin_memcpy(&words, p, left * sizeof *p);
    return words;
#endif
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
CHARGPT_INLINE Vec<int32_t> pair_up(HalfVec x, HalfVec y) {  // x0 x1 … and y0 y1 … -> x0 y0 x1 y1 …
#if CHARGPT_ISA_LEVEL >= 3
  const __m512i order = (__m512i)(Vec<int32_t>)(iota<float>() * 0x10001 + 0x100000);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)x), (__m256i)y, 1);
  return (Vec<int32_t>)_mm512_permutexvar_epi16(order, both);
#else
  return (Vec<int32_t>)(__builtin_convertvector(x, Vec<uint32_t>) | __builtin_convertvector(y, Vec<uint32_t>) << 16);
#endif
}

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
// missing last row becomes zeros; for the matrix unit all missing rows do.
template <class N>
void pack_paired(const Layout<N>& layout, const typename N::Storage* x, int64_t stride, int rows,
                 typename N::Word* tile) {
  using Word = typename N::Word;
  constexpr int kW = kLanes<Word>;
  for (int d = 0; d < layout.D; d += kW) {
    const int left = layout.D - d;
    Word* panel = tile + d / layout.width * layout.rows_panel() + d % layout.width;
    for (int r = 0; r < (kTiles<N> ? kTile : rows); r += N::kPair, panel += layout.width) {
      if (kTiles<N> && r >= rows) {
        store<Word>(panel, Vec<Word>{});
        continue;
      }
      const typename N::Storage* row = x + r * stride + d;
      if constexpr (N::kPair == 2) {
        store<Word>(panel, pair_up(load_half(row, left), r + 1 < rows ? load_half(row + stride, left) : HalfVec{}));
      } else {
        store<Word>(panel, load_words<N>(row, left));
      }
    }
  }
}

// tile[pair of rows][64 columns] -> turned[64 columns][pair of rows]: the matrix unit reads the A operand along its rows.
template <class N>
void turn(const typename N::Word* paired, typename N::Word* turned) {
  using Word = typename N::Word;
  constexpr int kPairs = kTile / 2;
  for (int pair = 0; pair < kPairs; pair += kEdge) {
    for (int column = 0; column < kTile; column += kEdge) {
      Vec<Word> square[kEdge];
#pragma GCC unroll 16
      for (int i = 0; i < kEdge; ++i) square[i] = load<Word>(paired + (pair + i) * kTile + column);
      transpose<Word>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kEdge; ++i) store<Word>(turned + (column + i) * kPairs + pair, square[i]);
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

}  // namespace chargpt::cpu::CHARGPT_ISA
