// The backward pass of attention_kernel.h, over attention_tiles.h.

namespace chargpt::cpu::CHARGPT_ISA {

template <class N>
struct BackwardScratch {
  typename N::Word *k_turned, *k_paired, *v_turned;          // all tiles of one head
  typename N::Acc *dk, *dv;                                  // (S in whole tiles, columns), unless the work is split
  uint8_t* packed;                                           // which tiles of k and v are
  typename N::Word *q_rows, *q_paired, *do_rows, *do_paired;  // one tile
  typename N::Acc *s, *dp, *dq;                              // (64, 64), (64, 64), (64, columns)
  typename N::Word *p_paired, *ds_paired, *ds_rows;          // P and dS as operands; for kPair = 1 these are s and dp
  typename N::Word *p_turned, *ds_turned;                    // for the matrix unit, (64 keys, 32 pairs of queries)
  typename N::Acc *lse, *dlse, *delta;                       // (64)
  uint32_t* halves;                                          // random halves of words, of four rows

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
    p_turned = reinterpret_cast<Word*>(s);  // which P takes the place of
    ds_turned = p_turned + kTile * kTile / N::kPair;
    lse = arena.take<Acc>(kTile);
    dlse = arena.take<Acc>(kTile);
    delta = arena.take<Acc>(kTile);
    halves = arena.take<uint32_t>(kStrip * kTile);
  }
};

// The 64 x 64 tile of P and dS from S and dP, as operands of the last three products.
template <class N>
void weights_tile(const BackwardCall& call, const BackwardScratch<N>& scratch, const Dropout& dropout, int64_t bh,
                  int64_t q0, int rows, int64_t k0) {
  using Acc = typename N::Acc;
  constexpr int kW = kLanes<Acc>;
  for (int r = 0; r < round_up(rows, N::kRows); r += kStrip) {
    const Strip seen(call.shape, call.options, q0 + r, rows - r, k0, kTile);
    for (int i = 0; dropout.on && i < kStrip && r + i < rows; ++i) {
      random_halves(call.options.seed, static_cast<uint32_t>(bh),
                   static_cast<uint32_t>(call.shape.S - call.shape.T + q0 + r + i), static_cast<uint32_t>(k0),
                   seen.high[i], scratch.halves + i * kTile);
    }
    for (int j = 0; j < kTile; j += kW) {
      const bool crosses = seen.crosses(j, kW), used = j < seen.outer_high;
      Vec<Acc> p[kStrip], ds[kStrip];
#pragma GCC unroll 4
      for (int i = 0; i < kStrip; ++i) {
        p[i] = ds[i] = Vec<Acc>{};
        if (!used) continue;
        const int at = (r + i) * kTile + j;
        const Acc scale = static_cast<Acc>(call.options.scale), grow = static_cast<Acc>(dropout.grow);
        p[i] = exponential_for<N>(scaled<N>(load<Acc>(scratch.s + at), scale) - scratch.lse[r + i]);
        Vec<Acc> dp = scaled<N>(load<Acc>(scratch.dp + at), grow);
        if (dropout.on) dp = drop<Acc>(dp, scratch.halves + i * kTile + j, dropout.threshold);
        ds[i] = p[i] * (dp - scratch.delta[r + i] + scratch.dlse[r + i]);  // d lse / d S is P
        if (dropout.on) p[i] = drop<Acc>(p[i], scratch.halves + i * kTile + j, dropout.threshold);
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
          const HalfVec ds_low = narrow(ds[i]), ds_high = narrow(ds[i + 1]);
          store<int32_t>(scratch.p_paired + (r + i) / 2 * kTile + j, pair_up(narrow(p[i]), narrow(p[i + 1])));
          store<int32_t>(scratch.ds_paired + (r + i) / 2 * kTile + j, pair_up(ds_low, ds_high));
          int32_t* row = scratch.ds_rows + (r + i) * (kTile / 2) + j / 2;
          store_half(reinterpret_cast<uint16_t*>(row), ds_low, kW);
          store_half(reinterpret_cast<uint16_t*>(row + kTile / 2), ds_high, kW);
        }
      }
    }
  }
}

// The A operand of dV and dK: keys from j on are its rows, and queries from word `start` on are contracted.
template <class N>
CHARGPT_INLINE A<N> by_key(const typename N::Word* paired, const typename N::Word* turned, int j, int start) {
  if constexpr (kTiles<N>) return {turned + j * (kTile / 2) + start, kTile / 2, 1};
  return {paired + start * kTile + j, 1, kTile};
}

// The word with which a contraction begins that needs the elements from n on.
template <class N>
CHARGPT_INLINE int first_word(int n) {
  return kTiles<N> ? n / (2 * kEdge) * kEdge : n / N::kPair;
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
    for (int r = 0; r < rows; r += N::kRows) {
      const int last = last_of<N>(r, rows);
      const int needed = (clamp(end_key(shape, q0 + last) - k0, 0, kTile) + kW - 1) / kW;
      strip<N, false>(needed, layout.depth, A<N>{scratch.q_rows + r * layout.pitch, layout.pitch, 1}, k_turned,
                      scratch.s + r * kTile, kTile, static_cast<Acc>(call.options.scale));
      if (k0 == first) {
        prefetch_rows<N>(call.q, shape.D, next.b, next.h, next.q0 + r, N::kRows);
        prefetch_rows<N>(call.dout, shape.D, next.b, next.h, next.q0 + r, N::kRows);
        prefetch_rows<N>(call.out, shape.D, next.b, next.h, next.q0 + r, N::kRows);
      }
    }
    // dP = dO Vᵀ
    for (int r = 0; r < rows; r += N::kRows) {
      const int last = last_of<N>(r, rows);
      const int needed = (clamp(end_key(shape, q0 + last) - k0, 0, kTile) + kW - 1) / kW;
      strip<N, false>(needed, layout.depth, A<N>{scratch.do_rows + r * layout.pitch, layout.pitch, 1}, v_turned,
                      scratch.dp + r * kTile, kTile, static_cast<Acc>(dropout.grow));
      if (k0 == first) {
        const int64_t t = shape.S - shape.T + q0 + r;
        prefetch_rows<N>(call.k, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, N::kRows);
        prefetch_rows<N>(call.v, shape.D, next_head / shape.H_kv, next_head % shape.H_kv, t, N::kRows);
      }
    }
    weights_tile<N>(call, scratch, dropout, bh, q0, rows, k0);
    if constexpr (kTiles<N>) {
      turn<N>(scratch.p_paired, scratch.p_turned);
      turn<N>(scratch.ds_paired, scratch.ds_turned);
    }
    // dQ += dS K
    for (int r = 0; r < rows; r += N::kRows) {
      const int last = last_of<N>(r, rows);
      const int needed = clamp(end_key(shape, q0 + last) - k0, 0, kTile);
      strip<N, true>(needed > 0 ? vectors : 0, whole_words<N>(needed),
                     A<N>{scratch.ds_rows + r * (kTile / N::kPair), kTile / N::kPair, 1}, k_paired,
                     scratch.dq + r * layout.columns, layout.columns);
      if (k0 == first) prefetch_rows<N, true>(call.dq, shape.D, b, h, q0 + r, last - r + 1);
    }
    // dV += Pᵀ dO and dK += dSᵀ Q, from the first query that sees any of four keys
    const int keys = clamp(end - k0, 0, kTile), steps = whole_words<N>(rows);
    for (int j = 0; j < keys; j += N::kRows) {
      const int start = first_word<N>(clamp(k0 + j - (shape.S - shape.T) - q0, 0, rows - 1));
      const B<N> dout_paired{scratch.do_paired + start * layout.width, layout.width, layout.rows_panel()};
      strip<N, true>(vectors, steps - start, by_key<N>(scratch.p_paired, scratch.p_turned, j, start), dout_paired,
                     dv + (k0 + j) * layout.columns, layout.columns);
    }
    for (int j = 0; j < keys; j += N::kRows) {
      const int start = first_word<N>(clamp(k0 + j - (shape.S - shape.T) - q0, 0, rows - 1));
      const B<N> q_paired{scratch.q_paired + start * layout.width, layout.width, layout.rows_panel()};
      strip<N, true>(vectors, steps - start, by_key<N>(scratch.ds_paired, scratch.ds_turned, j, start), q_paired,
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
  const MatrixUnit unit;
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

}  // namespace chargpt::cpu::CHARGPT_ISA
