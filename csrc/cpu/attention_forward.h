// The forward pass of attention_kernel.h, over attention_tiles.h.

namespace chargpt::cpu::CHARGPT_ISA {

template <class N>
struct ForwardScratch {
  typename N::Word *k, *v, *q;  // k and v: all tiles of one head; q: one tile of rows
  uint8_t* packed;              // which tiles of k and v are
  typename N::Acc *s, *o;       // (64, 256), (64, columns)
  typename N::Acc *m, *l;       // (64)
  uint32_t* halves;             // random halves of words, of four rows

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
    halves = arena.take<uint32_t>(kStrip * kChunk);
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
  return exponential(x);
}

// Four rows of S become P = exp(S - m), in the layout that P V reads; keys that a query does not see get 0, up to the
// vector before `end`. shrink = exp(m_old - m) is the factor on what was summed before.
template <class N>
CHARGPT_INLINE void softmax_strip(typename N::Acc* s, typename N::Acc scale, const Strip& seen, int end,
                                  const uint32_t* halves, uint32_t threshold, typename N::Acc* m, typename N::Acc* l,
                                  typename N::Acc* shrink) {
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
      Vec<Acc> x = scaled<N>(load<Acc>(s + r * kChunkPitch + j), scale);
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
  for (int j = 0; j < end; j += kW) {
    const bool crosses = seen.crosses(j, kW);
#pragma GCC unroll 4
    for (int r = 0; r < kStrip; ++r) {
      Acc* row = s + r * kChunkPitch;
      Vec<Acc> p{};
      if (j >= begin && j < seen.outer_high) {
        p = exponential_for<N>(scaled<N>(load<Acc>(row + j), scale) - highest[r]);
        if (crosses) p = within<Acc>(p, j, seen.low[r], seen.high[r], Vec<Acc>{});
        sum[r] += p;
        if (halves != nullptr) p = drop<Acc>(p, halves + r * kChunk + j, threshold);
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
      for (int r = 0; r < rows; r += N::kRows) {
        const int last = last_of<N>(r, rows), needed = clamp(end_key(shape, q0 + last) - chunk - j, 0, kTile);
        strip<N, false>((needed + kW - 1) / kW, layout.depth, A<N>{scratch.q + r * layout.pitch, layout.pitch, 1}, k,
                        scratch.s + r * kChunkPitch + j, kChunkPitch, static_cast<Acc>(call.options.scale));
        if (chunk == first && j == 0) {
          prefetch_rows<N, true>(call.out, shape.D, b, h, q0 + r, last - r + 1);
          prefetch_rows<N>(call.q, shape.D, next.b, next.h, next.q0 + r, N::kRows);
        }
      }
    }
    // P = exp(S - m)
    for (int r = 0; r < rows; r += kStrip) {
      const Strip seen(shape, call.options, q0 + r, rows - r, chunk, keys);
      for (int i = 0; dropout.on && i < kStrip && r + i < rows; ++i) {
        random_halves(call.options.seed, static_cast<uint32_t>(b * shape.H + h),
                     static_cast<uint32_t>(shape.S - shape.T + q0 + r + i), static_cast<uint32_t>(chunk), seen.high[i],
                     scratch.halves + i * kChunk);
      }
      if (chunk == first) {
        const int64_t t = shape.S - shape.T + q0 + r;
        prefetch_rows<N>(call.k, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
        prefetch_rows<N>(call.v, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, kStrip);
      }
      const int last = last_of<N>(r, rows);
      const int end = kTiles<N> ? whole_words<N>(clamp(end_key(shape, q0 + last) - chunk, 0, keys)) * 2 : seen.outer_high;
      Acc shrink[kStrip];
      softmax_strip<N>(scratch.s + r * kChunkPitch, static_cast<Acc>(call.options.scale), seen, end,
                       dropout.on ? scratch.halves : nullptr, dropout.threshold, scratch.m + r, scratch.l + r, shrink);
      if (chunk == first) continue;
      for (int i = 0; i < kStrip; ++i) {
        Acc* o = scratch.o + (r + i) * layout.columns;
        for (int d = 0; d < layout.columns; d += kW) store<Acc>(o + d, load<Acc>(o + d) * shrink[i]);
      }
    }
    // O += P V
    for (int j = 0; j < keys; j += kTile) {
      const B<N> v{scratch.v + (chunk + j) / kTile * layout.rows_tile(), layout.width, layout.rows_panel()};
      for (int r = 0; r < rows; r += N::kRows) {
        const int needed = clamp(end_key(shape, q0 + last_of<N>(r, rows)) - chunk - j, 0, kTile);
        const Word* p = reinterpret_cast<const Word*>(scratch.s + r * kChunkPitch) + j / N::kPair;
        strip<N, true>(needed > 0 ? layout.columns / kW : 0, whole_words<N>(needed),
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
  const MatrixUnit unit;
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

}  // namespace chargpt::cpu::CHARGPT_ISA
