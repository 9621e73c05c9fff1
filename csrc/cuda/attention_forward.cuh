// Causal attention forward for 16-bit dtypes: FlashAttention-2 (Dao 2023, algorithm 1) on mma.sync, two ways.
//
//   strip      A warp owns 16 · kM queries. Over 64 or 32 keys at a time: S = Q Kᵀ, X = S · scale · log2 e; new row
//              maxima m; P = 2^(X - m); l ← l · 2^(m_old - m) + rowsum P; O ← O · 2^(m_old - m) + P V. At the end O /
//              l, and lse = (m + log2 l) · ln 2. S, P and O live in registers: accumulators of S are left operands for
//              P V.
//   careful    Keys that some query of the strip does not see, and all keys under dropout, are done 32 at a time by a
//              variant of the step that compares positions, or drops weights; other keys by one that does neither. Keys
//              nobody sees are skipped.
//   resident   For few keys and many heads. A block owns a head: K and V are read once and stay in shared memory. The
//              n strips are shared out so that the warp with the heaviest strip, the last, also has the lightest, the
//              first: strip n - 1 - w and strip w. Warps need no barrier but one: K and V arrive in two halves, and
//              while the second half is on its way all warps do the same work, their heaviest strip on the first half.
//              Strips of 16 rows, for as many warps as can be: what it waits for is latency (measured, docs/kernels.md).
//   streaming  For all else. A block owns 4 strips and walks over tiles of K and V with two buffers: while one tile is
//              used, the next one arrives.
//
// Shared memory, 16-bit elements. resident: 2 · S · D for K and V, 16 · D for each warp's Q: at S = 256, D = 64, 8
// warps 80 KiB, two blocks per H100 multiprocessor; at S = 512, D = 64, 16 warps 160 KiB, one. streaming: see
// ForwardConfig.

#pragma once

#include "attention_tiles.cuh"

namespace chargpt::cuda {

// What fits. A strip of 32 queries reads each K and V fragment for two products instead of one, which relieves shared
// memory; from D = 96 on, O alone would fill the registers.
template <int D>
struct ForwardConfig {
  static constexpr int kM = D <= 64 ? 2 : 1;        // 16-row blocks of a strip of `streaming`
  static constexpr int kStrip = 16 * kM;
  static constexpr int kKeys = D <= 128 ? 64 : 32;  // of a step, and of a tile of `streaming`
  static constexpr bool kHeld = D <= 128;           // Q in registers
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of `streaming`
  static constexpr int kBlocks = D <= 16 ? 3 : 2;   // of `streaming` on a multiprocessor, as far as registers allow
  static constexpr int kRoundsTogether = D == 32 ? 1 : kPhiloxRounds;  // of Philox; with all, sm_80 spilled at D = 32
};
// `streaming`, D                    16    32    64    96   128   256
//   shared KiB per block            12    24    48    60    80    96
//   registers, sm_80 / sm_90a  165/161 185/186 240/254 176/180 205/209 255/254
// What ptxas reports must stay in these; shared memory beside the dynamic one is 0:
// budget: attention_forward_streaming<16, registers<=168 shared<=0
// budget: attention_forward_streaming registers<=255 shared<=0
// budget: attention_forward_resident registers<=128 shared<=0
inline constexpr int kCarefulKeys = 32;
inline constexpr int kResidentStrip = 16;
inline constexpr int kResidentWarps = 16;    // at most
inline constexpr int kResidentKeys = 512;    // at most
inline constexpr int kResidentHeadSize = 64; // at most

template <class Element, int D, int kM>
struct ForwardStrip {
  using Config = ForwardConfig<D>;
  static constexpr int kRows = 16 * kM;

  const Problem& problem;
  int batch_head, first;  // the strip's first query
  LeftRows<Element, D, kM, Config::kHeld> q;
  Accumulators<kM, D> o;
  float m[kM][2], l[kM][2];  // of rows 16 i + 8 j + g; l is this lane's share

  __device__ explicit ForwardStrip(const Problem& problem) : problem(problem) {}

  __device__ void start(int strip_batch_head, int strip_first, Tile<Element, D> q_strip) {
    batch_head = strip_batch_head;
    first = strip_first;
    q.take(q_strip);
    set_zero(o);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      m[i][0] = m[i][1] = -INFINITY;
      l[i][0] = l[i][1] = 0;
    }
  }

  // The strip sees keys in [begin_key(), end_key()), multiples of kCarefulKeys; none where it lies behind the last
  // query.
  __device__ int begin_key() const {
    return max(0, problem.position(first) - problem.window + 1) / kCarefulKeys * kCarefulKeys;
  }
  __device__ int end_key() const {
    return first < problem.T ? round_up(problem.position(min(first + kRows, problem.T)), kCarefulKeys) : 0;
  }

  // To the keys in [begin, end), multiples of kCarefulKeys; the first row of the tiles is key `base`.
  __device__ void attend(Tile<Element, D> k, Tile<Element, D> v, int base, int begin, int end) {
    const int low = problem.position(first), high = low + kRows - 1;
    for (int key = begin; key < end;) {
      const bool all_see = key + Config::kKeys - 1 <= low && key > high - problem.window;
      if (all_see && key + Config::kKeys <= end && !problem.dropout.on) {
        step<Config::kKeys, false>(k.from(key - base), v.from(key - base), key, false);
        key += Config::kKeys;
      } else {
        const bool edge = key + kCarefulKeys - 1 > low || key <= high - problem.window;
        step<kCarefulKeys, true>(k.from(key - base), v.from(key - base), key, edge);
        key += kCarefulKeys;
      }
    }
  }

  // edge: whether some query does not see some key
  template <int kKeys, bool kCareful>
  __device__ void step(Tile<Element, D> k, Tile<Element, D> v, int key, bool edge) {
    Accumulators<kM, kKeys> s;
    multiply_transposed(s, q, k);
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][n][e] *= problem.scale_log2;
      }
    }
    if constexpr (kCareful) {
      if (edge) hide(s, key);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) soften(s[i], i, half);
    }
    if constexpr (kCareful) {
      if (problem.dropout.on) drop(s, key);
    }
    multiply_add(o, s, v);
  }

  // Sets scores to −∞ where the query does not see the key.
  template <int kBlocks>
  __device__ void hide(float (&s)[kM][kBlocks][4], int key) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = problem.position(first) + 16 * i + 8 * half + lane_id() / 4;
        const int last = position - key - lane_id() % 4 * 2, hidden = last - problem.window;
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * n + e > last || 8 * n + e <= hidden) s[i][n][2 * half + e] = -INFINITY;
          }
        }
      }
    }
  }

  // Half of the rows of a 16-row block: scores in units of log2 become P, and m, l and O move to the new maximum.
  template <int kBlocks>
  __device__ void soften(float (&s)[kBlocks][4], int i, int half) {
    float top = m[i][half];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, 2));
    const float origin = top == -INFINITY ? 0 : top;  // of a row that has seen no key yet
    const float shrink = exp2_approx(m[i][half] - origin);
    m[i][half] = top;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        s[n][e] = exp2_approx(s[n][e] - origin);
        sum += s[n][e];
      }
    }
    l[i][half] = l[i][half] * shrink + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      o[i][n][2 * half] *= shrink;
      o[i][n][2 * half + 1] *= shrink;
    }
  }

  template <int kBlocks>
  __device__ void drop(float (&p)[kM][kBlocks][4], int key) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        bool keep[2][4];
        keep_by_query<Config::kRoundsTogether>(keep, problem.dropout, batch_head, problem.position(first) + 16 * i,
                                               key + 8 * n);
#pragma unroll
        for (int e = 0; e < 8; ++e) p[i][n + e / 4][e % 4] = keep[e / 4][e % 4] ? p[i][n + e / 4][e % 4] : 0;
      }
    }
  }

  __device__ void finish(Rows<Element> out, float* lse) {
    float factor[kM][2];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum = l[i][half];
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
        sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
        factor[i][half] = problem.dropout.grow / sum;
        const int query = first + 16 * i + 8 * half + lane_id() / 4;
        if (query < problem.T && lane_id() % 4 == 0) lse[query] = (m[i][half] + log2f(sum)) * kLn2;
      }
    }
    write_rows<Element, D, kM>(problem, out, first, problem.T, o, factor);
  }
};

template <class Element, int D>
struct ForwardMemory {
  using Config = ForwardConfig<D>;
  using Tiles = Tile<Element, D>;
  static constexpr int kStreaming = Tiles::bytes(Config::kWarps * Config::kStrip) + 4 * Tiles::bytes(Config::kKeys);
  static constexpr int resident(int keys, int warps) {
    return 2 * Tiles::bytes(round_up(keys, Config::kKeys)) + Tiles::bytes(warps * kResidentStrip);
  }
};

template <int D, class Element>
__global__ void __launch_bounds__(ForwardConfig<D>::kThreads, ForwardConfig<D>::kBlocks) attention_forward_streaming(
    ForwardCall call) {
  using Config = ForwardConfig<D>;
  constexpr int kQueries = Config::kWarps * Config::kStrip, kKeys = Config::kKeys, kThreads = Config::kThreads;
  const Problem problem = call.problem.begin();
  const int blocks = ceil_div(problem.T, kQueries);
  const Block block(problem.heads, blocks);
  const int first = (blocks - 1 - block.index) * kQueries;  // the heaviest first
  const int head_kv = block.head / problem.group, batch_head = block.batch * problem.heads + block.head;
  const auto k = rows_of<Element>(call.k, block.batch, head_kv), v = rows_of<Element>(call.v, block.batch, head_kv);

  const Tile<Element, D> q_tile{reinterpret_cast<Element*>(dynamic_shared())};
  const Tile<Element, D> buffers = q_tile.from(kQueries);  // K, V, K, V
  const auto load_keys = [&](int tile) {
    const Tile<Element, D> to = buffers.from(tile % 2 * 2 * kKeys);
    load_tile(problem, to, k, tile * kKeys, kKeys, problem.S, threadIdx.x, kThreads);
    load_tile(problem, to.from(kKeys), v, tile * kKeys, kKeys, problem.S, threadIdx.x, kThreads);
    cp_async_commit();
  };

  const int last_query = min(first + kQueries, problem.T) - 1;
  const int begin = max(0, problem.position(first) - problem.window + 1) / kKeys;
  const int end = problem.position(last_query) / kKeys + 1;
  load_tile(problem, q_tile, rows_of<Element>(call.q, block.batch, block.head), first, kQueries, problem.T, threadIdx.x,
            kThreads);
  load_keys(begin);
  ForwardStrip<Element, D, Config::kM> strip(problem);
  for (int tile = begin; tile < end; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and the one before it is no longer needed
    if (tile + 1 < end) load_keys(tile + 1);
    if (tile == begin) {
      strip.start(batch_head, first + warp_id() * Config::kStrip, q_tile.from(warp_id() * Config::kStrip));
    }
    const Tile<Element, D> here = buffers.from(tile % 2 * 2 * kKeys);
    strip.attend(here, here.from(kKeys), tile * kKeys, max(strip.begin_key(), tile * kKeys),
                 min(strip.end_key(), (tile + 1) * kKeys));
  }
  strip.finish(rows_of<Element>(call.out, block.batch, block.head), call.lse + int64_t{batch_head} * problem.T);
}

template <int D, class Element>
__global__ void __launch_bounds__(32 * kResidentWarps, 1) attention_forward_resident(ForwardCall call) {
  using Config = ForwardConfig<D>;
  const Problem problem = call.problem.begin();
  const int warps = blockDim.x / 32, strips = ceil_div(problem.T, kResidentStrip);
  const Block block(problem.heads, 1);
  const int head_kv = block.head / problem.group, batch_head = block.batch * problem.heads + block.head;
  const auto q = rows_of<Element>(call.q, block.batch, block.head);
  const auto k = rows_of<Element>(call.k, block.batch, head_kv), v = rows_of<Element>(call.v, block.batch, head_kv);

  const int keys = round_up(problem.S, Config::kKeys), half = round_up(keys / 2, kCarefulKeys);
  const Tile<Element, D> k_tile{reinterpret_cast<Element*>(dynamic_shared())}, v_tile = k_tile.from(keys);
  const Tile<Element, D> q_tile = v_tile.from(keys + warp_id() * kResidentStrip);  // this warp's own
  const auto load_keys = [&](int from, int to) {
    load_tile(problem, k_tile.from(from), k, from, to - from, problem.S, threadIdx.x, blockDim.x);
    load_tile(problem, v_tile.from(from), v, from, to - from, problem.S, threadIdx.x, blockDim.x);
    cp_async_commit();
  };
  // The warp's strips: heavy ones and light ones in turn. Negative: no more.
  const auto strip_of = [&](int round) {
    return strips - 1 - round * warps - (round % 2 == 0 ? warp_id() : warps - 1 - warp_id());
  };
  const auto load_queries = [&](int round) {
    const int strip = strip_of(round);
    if (strip >= 0) {
      load_tile(problem, q_tile, q, strip * kResidentStrip, kResidentStrip, problem.T, lane_id(), 32);
    }
    cp_async_commit();
  };

  load_queries(0);
  load_keys(0, half);
  load_keys(half, keys);
  ForwardStrip<Element, D, 1> strip(problem);
  // Round 0 takes two legs: the keys before `half`, then the others. Each other round takes one.
  for (int leg = 0, round = 0; round * warps < strips; ++leg, round += leg > 1) {
    if (leg == 0) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    if (leg <= 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (strip_of(round) < 0) break;
    if (leg != 1) {
      strip.start(batch_head, strip_of(round) * kResidentStrip, q_tile);
      __syncwarp();  // Q is in registers; its place is free
      load_queries(round + 1);
    }
    const int begin = strip.begin_key(), end = strip.end_key();
    strip.attend(k_tile, v_tile, 0, leg == 1 ? max(begin, half) : begin, leg == 0 ? min(end, half) : end);
    if (leg >= 1) {
      strip.finish(rows_of<Element>(call.out, block.batch, block.head), call.lse + int64_t{batch_head} * problem.T);
    }
  }
}

}  // namespace chargpt::cuda
