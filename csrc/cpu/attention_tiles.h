// What the forward and the backward pass of attention_kernel.h share, over micro_kernel.h: rows of a head, masks, dropout.

namespace chargpt::cpu::CHARGPT_ISA {

inline constexpr int kChunk = 256;               // keys between two rescalings of O in the forward pass
inline constexpr int kChunkPitch = kChunk + 16;  // of a row of S, so that rows do not share the sets of L1

// Blocks of queries of one head
inline int64_t blocks_of(const AttentionShape& shape) { return (shape.T + kTile - 1) / kTile; }

// Of the rows that are multiplied together with row r, the last that exists.
template <class N>
CHARGPT_INLINE int last_of(int r, int rows) {
  const int end = r / N::kRows * N::kRows + N::kRows;
  return (end <= rows ? end : rows) - 1;
}

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
  return ((lane >= low) & (lane < high)) ? x : other;
}

}  // namespace chargpt::cpu::CHARGPT_ISA
