// Causal attention backward for 16-bit dtypes: FlashAttention-2 (Dao 2023, algorithm 2) on mma.sync, in two kernels,
// after delta = rowsum(dO ∘ O) - dlse, one number for each query, is known (attention.cu).
//
//   dk_dv   A warp owns 16 · kM keys and walks over the queries that see them, and over the query heads that share the
//           keys: Sᵀ = K Qᵀ, Pᵀ = exp(scale · Sᵀ - lse), dPᵀ = V dOᵀ, dSᵀ = Pᵀ ∘ (dPᵀ - delta); dV += Pᵀ dO, dK += dSᵀ
//           Q.
//   dq      A warp owns 16 · kM queries and walks over their keys: S, P, dP and dS again, not transposed; dQ += dS K.
//
// Why two: each gradient then has one writer that adds up in one order, so results are the same bits every time with
// neither atomics nor float32 copies of dQ; and as accumulators of Sᵀ, or S, are left operands for the next product, P
// and dS never leave registers and warps never wait for each other's. The price: seven products instead of five.
// Both stream as the forward does: a block's warps share tiles of the other side, which arrive in two buffers. Steps
// are 32 queries (keys) wide; those that need positions compared, or dropout, are done by the careful variant.
//
// Shared memory: 2 · rows of the strips + 4 · kTile rows (and 4 · kTile floats) of D elements; see Config.

#pragma once

#include "attention_tiles.cuh"

namespace chargpt::cuda {

// What fits. Strips of 16 rows, and as many blocks on a multiprocessor as registers allow. For dQ at D = 64 on an H100 that
// was 4 to 15 % faster under dropout than strips of 32 queries in two blocks, which read K and V half as often, and between
// 7 % faster (T = 256) and 10 % slower (T = 1024) without. Smaller D follow it, not measured.
template <int D>
struct DkDvConfig {
  static constexpr int kM = 1;                       // 16-row blocks of a strip
  static constexpr bool kHeld = D < 64 || D == 96;   // K and V in registers; at D = 64 a third block needs their place
  static constexpr int kWarps = D <= 128 ? 4 : 2, kThreads = 32 * kWarps;
  static constexpr int kTile = D <= 64 ? 64 : 32;    // queries of a tile
  static constexpr int kStep = D <= 128 ? 32 : 16;   // and those of them that are worked on together
  static constexpr bool kTogether = D <= 128;        // dK and dV in one go; else a launch for each
  static constexpr int kBlocks = D <= 16 ? 4 : D <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers allow
};
// dk_dv, D                          16    32    64    96   128   256
//   shared KiB per block            13    25    49  48.5  64.5  96.5
//   registers, sm_80 / sm_90a  118/127 148/158 168/168 251/255 255/255 255/255
// budget: attention_backward_dk_dv<16, registers<=128 shared<=0
// budget: attention_backward_dk_dv<32, registers<=168 shared<=0
// budget: attention_backward_dk_dv<64, registers<=168 shared<=0
// budget: attention_backward_dk_dv registers<=255 shared<=0

template <int D>
struct DqConfig {
  static constexpr int kM = 1;                       // as above
  static constexpr bool kHeld = D <= 128;            // Q and dO in registers
  static constexpr int kWarps = D <= 128 ? 4 : 2, kThreads = 32 * kWarps;
  static constexpr int kTile = D <= 64 ? 64 : 32;    // keys of a tile
  static constexpr int kStep = D == 256 ? 16 : 32;   // and those of them that are worked on together
  static constexpr int kBlocks = D <= 16 ? 4 : D <= 64 ? 3 : 2;  // on a multiprocessor, as far as registers allow
  static constexpr int kRoundsTogether = D <= 128 ? kPhiloxRounds : 1;  // of Philox; all take 14 registers for keys
};
// dq, D                             16    32    64    96   128   256
//   shared KiB per block            12    24    48    48    64    96
//   registers, sm_80 / sm_90a  107/113 124/131 159/161 200/213 227/240 254/254
// budget: attention_backward_dq<16, registers<=128 shared<=0
// budget: attention_backward_dq<32, registers<=168 shared<=0
// budget: attention_backward_dq<64, registers<=168 shared<=0
// budget: attention_backward_dq registers<=255 shared<=0

template <class Element, int D, class Config>
constexpr int backward_shared_bytes() {
  using Tiles = Tile<Element, D>;
  return 2 * Tiles::bytes(16 * Config::kM * Config::kWarps) + 4 * Tiles::bytes(Config::kTile);
}

// ---- What dq and dk_dv share ---------------------------------------------------------------------------------------

// P = 2^(S · scale · log2 e - lse · log2 e). Rounding of a huge lse must not make it larger than 1.
__device__ inline float probability(const Problem& problem, float s, float lse_log2) {
  return exp2_approx(fminf(s * problem.scale_log2 - lse_log2, 0));
}

// ---- dQ ------------------------------------------------------------------------------------------------------------

template <class Element, int D>
struct DqStrip {
  using Config = DqConfig<D>;
  static constexpr int kM = Config::kM, kRows = 16 * kM, kStep = Config::kStep;

  const Problem& problem;
  int batch_head, first;  // the strip's first query
  LeftRows<Element, D, kM, Config::kHeld> q, dout;
  Accumulators<kM, D> dq;
  float lse_log2[kM][2], delta[kM][2];

  __device__ DqStrip(const Problem& problem, int batch_head, int first)
      : problem(problem), batch_head(batch_head), first(first) {}

  __device__ void start(Tile<Element, D> q_strip, Tile<Element, D> dout_strip, const float* lse, const float* deltas) {
    q.take(q_strip);
    dout.take(dout_strip);
    set_zero(dq);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int query = first + 16 * i + 8 * half + lane_id() / 4;
        lse_log2[i][half] = query < problem.T ? lse[query] * kLog2E : 0;
        delta[i][half] = query < problem.T ? deltas[query] : 0;
      }
    }
  }

  // The strip sees keys in [begin_key(), end_key()), multiples of kStep; none where it lies behind the last query.
  __device__ int begin_key() const { return max(0, problem.position(first) - problem.window + 1) / kStep * kStep; }
  __device__ int end_key() const {
    return first < problem.T ? round_up(problem.position(min(first + kRows, problem.T)), kStep) : 0;
  }

  // Adds what keys [begin, end) contribute; the first row of the tiles is key `base`.
  __device__ void add(Tile<Element, D> k, Tile<Element, D> v, int base, int begin, int end) {
    const int low = problem.position(first), high = low + kRows - 1;
    for (int key = begin; key < end; key += kStep) {
      const bool edge = key + kStep - 1 > low || key <= high - problem.window;
      if (edge || problem.dropout.on) {
        step<true>(k.from(key - base), v.from(key - base), key, edge);
      } else {
        step<false>(k.from(key - base), v.from(key - base), key, edge);
      }
    }
  }

  // edge: whether some query does not see some key
  template <bool kCareful>
  __device__ void step(Tile<Element, D> k, Tile<Element, D> v, int key, bool edge) {
    Accumulators<kM, kStep> s, dp;
    multiply_transposed(s, q, k);
    multiply_transposed(dp, dout, v);
    if constexpr (kCareful) {
      if (problem.dropout.on) drop(dp, key);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float p = probability(problem, s[i][n][e], lse_log2[i][e / 2]);
          s[i][n][e] = p * (dp[i][n][e] - delta[i][e / 2]);
        }
        if constexpr (kCareful) {
          if (edge) hide(s[i][n], 16 * i, key + 8 * n);
        }
      }
    }
    multiply_add(dq, s, k);
  }

  __device__ void drop(Accumulators<kM, kStep>& dp, int key) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kStep / 8; n += 2) {
        bool keep[2][4];
        keep_by_query<Config::kRoundsTogether>(keep, problem.dropout, batch_head, problem.position(first + 16 * i),
                                               key + 8 * n);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          float& x = dp[i][n + e / 4][e % 4];
          x = keep[e / 4][e % 4] ? x * problem.dropout.grow : 0;
        }
      }
    }
  }

  // Sets a 16 x 8 block of dS to 0 where the query does not see the key.
  __device__ void hide(float (&ds)[4], int row, int key) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int position = problem.position(first + row + lane_id() / 4 + e / 2 * 8);
      const int distance = position - (key + lane_id() % 4 * 2 + e % 2);
      if (distance < 0 || distance >= problem.window) ds[e] = 0;
    }
  }

  __device__ void finish(Rows<Element> rows) {
    float factor[kM][2];
#pragma unroll
    for (int i = 0; i < kM; ++i) factor[i][0] = factor[i][1] = problem.scale;
    write_rows<Element, D, kM>(problem, rows, first, problem.T, dq, factor);
  }
};

template <int D, class Element>
__global__ void __launch_bounds__(DqConfig<D>::kThreads, DqConfig<D>::kBlocks) attention_backward_dq(
    BackwardCall call) {
  using Config = DqConfig<D>;
  constexpr int kStrip = 16 * Config::kM, kQueries = Config::kWarps * kStrip, kKeys = Config::kTile;
  constexpr int kThreads = Config::kThreads;
  const Problem problem = call.problem.begin();
  const int blocks = ceil_div(problem.T, kQueries);
  const Block block(problem.heads, blocks);
  const int first = (blocks - 1 - block.index) * kQueries;  // the heaviest first
  const int head_kv = block.head / problem.group, batch_head = block.batch * problem.heads + block.head;
  const int64_t row = int64_t{batch_head} * problem.T;
  const auto k = rows_of<Element>(call.k, block.batch, head_kv), v = rows_of<Element>(call.v, block.batch, head_kv);

  const Tile<Element, D> q_tile{reinterpret_cast<Element*>(dynamic_shared())}, dout_tile = q_tile.from(kQueries);
  const Tile<Element, D> buffers = dout_tile.from(kQueries);  // K, V, K, V
  const auto load_keys = [&](int tile) {
    const Tile<Element, D> to = buffers.from(tile % 2 * 2 * kKeys);
    load_tile(problem, to, k, tile * kKeys, kKeys, problem.S, threadIdx.x, kThreads);
    load_tile(problem, to.from(kKeys), v, tile * kKeys, kKeys, problem.S, threadIdx.x, kThreads);
    cp_async_commit();
  };

  const int begin = max(0, problem.position(first) - problem.window + 1) / kKeys;
  const int end = problem.position(min(first + kQueries, problem.T) - 1) / kKeys + 1;
  const int own = warp_id() * kStrip;
  load_tile(problem, q_tile, rows_of<Element>(call.q, block.batch, block.head), first, kQueries, problem.T, threadIdx.x,
            kThreads);
  load_tile(problem, dout_tile, rows_of<Element>(call.dout, block.batch, block.head), first, kQueries, problem.T,
            threadIdx.x, kThreads);
  load_keys(begin);
  DqStrip<Element, D> strip(problem, batch_head, first + own);
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it is no longer needed
    if (tile + 1 < end) load_keys(tile + 1);
    if (tile == begin) strip.start(q_tile.from(own), dout_tile.from(own), call.lse + row, call.delta + row);
    const Tile<Element, D> here = buffers.from(tile % 2 * 2 * kKeys);
    strip.add(here, here.from(kKeys), tile * kKeys, max(strip.begin_key(), tile * kKeys),
              min(strip.end_key(), (tile + 1) * kKeys));
  }
  strip.finish(rows_of<Element>(call.dq, block.batch, block.head));
}

// ---- dK and dV -----------------------------------------------------------------------------------------------------

// kDk, kDv: which of the two this kernel makes.
template <class Element, int D, bool kDk, bool kDv>
struct DkDvStrip {
  using Config = DkDvConfig<D>;
  static constexpr int kM = Config::kM, kRows = 16 * kM, kStep = Config::kStep;

  const Problem& problem;
  int first;  // the strip's first key
  LeftRows<Element, D, kM, Config::kHeld> k, v;
  Accumulators<kM, kDk ? D : 8> dk;
  Accumulators<kM, kDv ? D : 8> dv;

  __device__ DkDvStrip(const Problem& problem, int first) : problem(problem), first(first) {
    set_zero(dk);
    set_zero(dv);
  }

  __device__ void start(Tile<Element, D> k_strip, Tile<Element, D> v_strip) {
    k.take(k_strip);
    if constexpr (kDk) v.take(v_strip);
  }

  // Queries in [begin_query(), end_query()) see keys of the strip; begin_query() is a multiple of kStep.
  __device__ int begin_query() const { return max(0, first - problem.position(0)) / kStep * kStep; }
  __device__ int end_query() const {
    return first < problem.S ? min(problem.T, first + kRows - 1 + problem.window - problem.position(0)) : 0;
  }

  // Adds what queries [begin, end) of one head contribute; the first row of the tiles, and the first of lse and delta,
  // is query `base`.
  __device__ void add(int batch_head, Tile<Element, D> q, Tile<Element, D> dout, const float* lse, const float* delta,
                      int base, int begin, int end) {
    for (int query = begin; query < end; query += kStep) {
      const int low = problem.position(query), high = low + kStep - 1, at = query - base;
      const bool edge = first + kRows - 1 > low || first <= high - problem.window;
      if (edge || problem.dropout.on) {
        step<true>(batch_head, q.from(at), dout.from(at), lse + at, delta + at, low, edge);
      } else {
        step<false>(batch_head, q.from(at), dout.from(at), lse + at, delta + at, low, edge);
      }
    }
  }

  template <bool kCareful>
  __device__ void step(int batch_head, Tile<Element, D> q, Tile<Element, D> dout, const float* lse, const float* delta,
                       int position, bool edge) {
    Accumulators<kM, kStep> s, dp;
    multiply_transposed(s, k, q);
    if constexpr (kDk) multiply_transposed(dp, v, dout);
    bool keep[kM][2][4];  // of two blocks
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
      const int column = 8 * n + lane_id() % 4 * 2;
      const float2 lse_pair = *reinterpret_cast<const float2*>(lse + column);
      const float2 delta_pair = *reinterpret_cast<const float2*>(delta + column);
      const float lse_log2[2] = {lse_pair.x * kLog2E, lse_pair.y * kLog2E}, deltas[2] = {delta_pair.x, delta_pair.y};
#pragma unroll
      for (int i = 0; i < kM; ++i) {
        if (kCareful && n % 2 == 0) {
          if (problem.dropout.on) {
            keep_by_key(keep[i], problem.dropout, batch_head, position + 8 * n, first + 16 * i);
          }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const bool kept = !kCareful || !problem.dropout.on || keep[i][n % 2][e];
          float p = probability(problem, s[i][n][e], lse_log2[e % 2]);
          if constexpr (kCareful) {
            const int distance = position + column + e % 2 - (first + 16 * i + lane_id() / 4 + e / 2 * 8);
            if (edge && (distance < 0 || distance >= problem.window)) p = 0;
          }
          s[i][n][e] = kept ? p : 0;
          if constexpr (kDk) dp[i][n][e] = p * ((kept ? dp[i][n][e] * problem.dropout.grow : 0) - deltas[e % 2]);
        }
      }
    }
    if constexpr (kDv) multiply_add(dv, s, dout);
    if constexpr (kDk) multiply_add(dk, dp, q);
  }

  __device__ void finish(Rows<Element> dk_rows, Rows<Element> dv_rows) {
    float factor[kM][2];
#pragma unroll
    for (int i = 0; i < kM; ++i) factor[i][0] = factor[i][1] = problem.scale;
    if constexpr (kDk) write_rows<Element, D, kM>(problem, dk_rows, first, problem.S, dk, factor);
#pragma unroll
    for (int i = 0; i < kM; ++i) factor[i][0] = factor[i][1] = problem.dropout.grow;
    if constexpr (kDv) write_rows<Element, D, kM>(problem, dv_rows, first, problem.S, dv, factor);
  }
};

template <int D, class Element, bool kDk, bool kDv>
__global__ void __launch_bounds__(DkDvConfig<D>::kThreads, DkDvConfig<D>::kBlocks) attention_backward_dk_dv(
    BackwardCall call) {
  using Config = DkDvConfig<D>;
  constexpr int kStrip = 16 * Config::kM, kKeys = Config::kWarps * kStrip, kQueries = Config::kTile;
  constexpr int kThreads = Config::kThreads;
  const Problem problem = call.problem.begin();
  const Block block(problem.heads_kv, ceil_div(problem.S, kKeys));  // the heaviest come first
  const int first = block.index * kKeys, own = warp_id() * kStrip;
  DkDvStrip<Element, D, kDk, kDv> strip(problem, first + own);

  const Tile<Element, D> k_tile{reinterpret_cast<Element*>(dynamic_shared())}, v_tile = k_tile.from(kKeys);
  const Tile<Element, D> buffers = v_tile.from(kKeys);  // Q, dO, Q, dO
  float* const numbers = reinterpret_cast<float*>(buffers.from(4 * kQueries).data);  // lse, delta, lse, delta

  // All tiles of queries that see keys of the block, head by head
  const int begin = max(0, first - problem.position(0)) / kQueries;
  const int last_seeing = min(problem.T - 1, first + kKeys - 1 + problem.window - 1 - problem.position(0));
  const int tiles = last_seeing < 0 ? 0 : max(0, last_seeing / kQueries + 1 - begin);
  const auto load_queries = [&](int number) {
    const int head = block.head * problem.group + number / tiles, query = (begin + number % tiles) * kQueries;
    const Tile<Element, D> to = buffers.from(number % 2 * 2 * kQueries);
    load_tile(problem, to, rows_of<Element>(call.q, block.batch, head), query, kQueries, problem.T, threadIdx.x,
              kThreads);
    load_tile(problem, to.from(kQueries), rows_of<Element>(call.dout, block.batch, head), query, kQueries, problem.T,
              threadIdx.x, kThreads);
    // Behind the last query, Q, dO, lse and delta are 0, and so is what they add.
    const int64_t row = (int64_t{block.batch} * problem.heads + head) * problem.T;
    float* const pair = numbers + number % 2 * 2 * kQueries;
    for (int i = threadIdx.x; i < 2 * kQueries; i += kThreads) {
      const float* from = (i < kQueries ? call.lse : call.delta) + row;
      const bool valid = query + i % kQueries < problem.T;
      cp_async_4(pair + i, valid ? from + query + i % kQueries : from, valid);
    }
    cp_async_commit();
  };

  const int count = tiles * problem.group;
  if (count > 0) {
    load_tile(problem, k_tile, rows_of<Element>(call.k, block.batch, block.head), first, kKeys, problem.S, threadIdx.x,
              kThreads);
    if constexpr (kDk) {
      load_tile(problem, v_tile, rows_of<Element>(call.v, block.batch, block.head), first, kKeys, problem.S,
                threadIdx.x, kThreads);
    }
    load_queries(0);
  }
  for (int number = 0; number < count; ++number) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it is no longer needed
    if (number + 1 < count) load_queries(number + 1);
    if (number == 0) strip.start(k_tile.from(own), v_tile.from(own));
    const Tile<Element, D> here = buffers.from(number % 2 * 2 * kQueries);
    const float* const pair = numbers + number % 2 * 2 * kQueries;
    const int head = block.head * problem.group + number / tiles, base = (begin + number % tiles) * kQueries;
    strip.add(block.batch * problem.heads + head, here, here.from(kQueries), pair, pair + kQueries, base,
              max(strip.begin_query(), base), min(strip.end_query(), base + kQueries));
  }
  strip.finish(rows_of<Element>(call.dk, block.batch, block.head), rows_of<Element>(call.dv, block.batch, block.head));
}

template <class Element, int D>
constexpr int dk_dv_shared_bytes() {
  constexpr int kNumbers = 4 * DkDvConfig<D>::kTile;
  return backward_shared_bytes<Element, D, DkDvConfig<D>>() + kNumbers * static_cast<int>(sizeof(float));
}

}  // namespace chargpt::cuda
