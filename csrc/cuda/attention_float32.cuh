// Causal attention for float32, forward and backward, on the ordinary units: the tensor cores would round to 10 bits.
// The algorithm, and the reason for two backward kernels, are those of attention_forward.cuh and
// attention_backward.cuh.
// The tiles are those of attention_float32_tiles.cuh.
//
// Shared memory: 3 tiles of kTile x D and one of kTile x (kTile + 4) forward, 64 KiB at D = 64; one tile more for dQ;
// two more for dK and dV, 98 KiB at D = 64, 133 KiB at D = 256, which chips with 99 KiB a block (sm_86, sm_89, sm_120)
// lack.

#pragma once

#include "attention_float32_tiles.cuh"

namespace chargpt::cuda {

// D                                 16    32    64    96   128   256
//   threads                        256   256   256    64    64    64
//   registers, sm_90a: forward      96   120   128   160   168   240
//                      dq          102   128   132   168   202   254
//                      dk_dv        93   128   150   218   252   254
// budget: attention_forward_float32<64> registers<=128 shared<=0
// budget: attention_forward_float32 registers<=255 shared<=0
// budget: attention_backward_dq_float32 registers<=255 shared<=0
// budget: attention_backward_dk_dv_float32 registers<=255 shared<=0

// ---- Forward -------------------------------------------------------------------------------------------------------

// Four rows of scores, each held by the threads of one y, become P; m, l and O move to the new maximum. Exponents of 2,
// as in the 16-bit kernels, would cost accuracy: X · log2 e - m · log2 e rounds X, which may be large, once more. So
// would a multiply-add X - m: m, and lse where one key outweighs all others, is a rounded X, and the backward pass
// needs 2^0.
template <int D>
__device__ inline void soften(Square& s, Part<D>& o, float (&m)[4], float (&l)[4]) {
  using Config = Float32Config<D>;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float top = fmaxf(fmaxf(m[i], fmaxf(s[i][0], s[i][1])), fmaxf(s[i][2], s[i][3]));
#pragma unroll
    for (int lanes = Config::kX / 2; lanes > 0; lanes /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFF, top, lanes));
    const float origin = top == -INFINITY ? 0 : top;  // of a row that has seen no key yet
    const float shrink = expf(m[i] - origin);
    m[i] = top;
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = expf(s[i][j] - origin);
    l[i] = l[i] * shrink + ((s[i][0] + s[i][1]) + (s[i][2] + s[i][3]));
#pragma unroll
    for (int g = 0; g < Config::kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < Config::kVector; ++n) o[i][g][n] *= shrink;
    }
  }
}

template <int D>
__global__ void __launch_bounds__(Float32Config<D>::kThreads, 1) attention_forward_float32(ForwardCall call) {
  using Config = Float32Config<D>;
  constexpr int kTile = Config::kTile;
  const Problem problem = call.problem.begin();
  const Place<D> place;
  const int blocks = ceil_div(problem.T, kTile);
  const Block block(problem.heads, blocks);
  const int first = (blocks - 1 - block.index) * kTile;  // the heaviest first
  const int head_kv = block.head / problem.group, batch_head = block.batch * problem.heads + block.head;
  const auto k_rows = rows_of<float>(call.k, block.batch, head_kv);
  const auto v_rows = rows_of<float>(call.v, block.batch, head_kv);

  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const FloatTile<D> q{shared}, k{q.data + Config::kTileFloats}, v{k.data + Config::kTileFloats};
  float* const p = v.data + Config::kTileFloats;

  q.load(problem, rows_of<float>(call.q, block.batch, block.head), first, problem.T);
  Part<D> o;
  float m[4], l[4] = {};
  set_zero<D>(o);
#pragma unroll
  for (int i = 0; i < 4; ++i) m[i] = -INFINITY;
  const KeyTiles<D> tiles(problem, first);
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    const int key = tile * kTile;
    k.load(problem, k_rows, key, problem.S);
    v.load(problem, v_rows, key, problem.S);
    arrive();
    Square s;
    dot<D>(s, q, k);
    const bool edge = !all_see(problem, first, key, kTile);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[i][j] = __fmul_rn(s[i][j], problem.scale);
        if (edge && !sees(problem, first + 4 * place.y + i, key + 4 * place.x + j)) s[i][j] = -INFINITY;
      }
    }
    soften<D>(s, o, m, l);
    if (problem.dropout.on) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        bool keep[4];
        keep_keys(keep, problem, batch_head, first + 4 * place.y + i, key + 4 * place.x);
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] = keep[j] ? s[i][j] : 0;
      }
    }
    write_square<D>(p, s);
    __syncwarp();  // a warp reads only the rows of P that it wrote
    multiply_add<D>(o, p, v);
    __syncthreads();  // K, V and P are free
  }

  float factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float sum = l[i];
#pragma unroll
    for (int lanes = Config::kX / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
    factor[i] = problem.dropout.grow / sum;
    const int query = first + 4 * place.y + i;
    if (query < problem.T && place.x == 0) {
      // Rounded once, since the backward pass makes P from it
      call.lse[int64_t{batch_head} * problem.T + query] = static_cast<float>(m[i] + log(static_cast<double>(sum)));
    }
  }
  write_rows<D>(problem, rows_of<float>(call.out, block.batch, block.head), first, problem.T, o, factor);
}

// ---- Backward ------------------------------------------------------------------------------------------------------

// S and dP, for queries from `query` on and keys from `key` on, become P after dropout, but for the factor 1 / (1 - p),
// and dS. row: of the first query in lse and delta.
template <int D>
__device__ inline void gradients(Square& s, Square& dp, const BackwardCall& call, int batch_head, int query, int key) {
  constexpr int kTile = Float32Config<D>::kTile;
  const Problem problem = call.problem.begin();
  const Place<D> place;
  const bool edge = !all_see(problem, query, key, kTile);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int mine = query + 4 * place.y + i;
    const int64_t at = int64_t{batch_head} * problem.T + mine;
    // Behind the last query, Q and dO are 0, and with the numbers below so is all that it adds.
    const bool valid = mine < problem.T;
    const float lse = valid ? call.lse[at] : 0, delta = valid ? call.delta[at] : 0;
    const float dlse = valid && call.dlse != nullptr ? call.dlse[at] : 0;
    bool keep[4] = {true, true, true, true};
    if (problem.dropout.on) keep_keys(keep, problem, batch_head, mine, key + 4 * place.x);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      // Rounding of a huge lse must not make P larger than 1.
      float p = expf(fminf(__fmul_rn(s[i][j], problem.scale) - lse, 0));
      if (edge && !sees(problem, mine, key + 4 * place.x + j)) p = 0;
      s[i][j] = keep[j] ? p : 0;
      dp[i][j] = p * (((keep[j] ? dp[i][j] * problem.dropout.grow : 0) - delta) + dlse);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(Float32Config<D>::kThreads, 1) attention_backward_dq_float32(BackwardCall call) {
  using Config = Float32Config<D>;
  constexpr int kTile = Config::kTile;
  const Problem problem = call.problem.begin();
  const int blocks = ceil_div(problem.T, kTile);
  const Block block(problem.heads, blocks);
  const int first = (blocks - 1 - block.index) * kTile;  // the heaviest first
  const int head_kv = block.head / problem.group, batch_head = block.batch * problem.heads + block.head;
  const auto k_rows = rows_of<float>(call.k, block.batch, head_kv);
  const auto v_rows = rows_of<float>(call.v, block.batch, head_kv);

  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const FloatTile<D> q{shared}, dout{q.data + Config::kTileFloats}, k{dout.data + Config::kTileFloats},
      v{k.data + Config::kTileFloats};
  float* const ds = v.data + Config::kTileFloats;

  q.load(problem, rows_of<float>(call.q, block.batch, block.head), first, problem.T);
  dout.load(problem, rows_of<float>(call.dout, block.batch, block.head), first, problem.T);
  Part<D> dq;
  set_zero<D>(dq);
  const KeyTiles<D> tiles(problem, first);
  for (int tile = tiles.begin; tile < tiles.end; ++tile) {
    k.load(problem, k_rows, tile * kTile, problem.S);
    v.load(problem, v_rows, tile * kTile, problem.S);
    arrive();
    Square s, dp;
    dot<D>(s, q, k);
    dot<D>(dp, dout, v);
    gradients<D>(s, dp, call, batch_head, first, tile * kTile);
    write_square<D>(ds, dp);
    __syncwarp();  // a warp reads only the rows of dS that it wrote
    multiply_add<D>(dq, ds, k);
    __syncthreads();  // K, V and dS are free
  }
  const float factor[4] = {problem.scale, problem.scale, problem.scale, problem.scale};
  write_rows<D>(problem, rows_of<float>(call.dq, block.batch, block.head), first, problem.T, dq, factor);
}

// kDk, kDv: which of the two this kernel makes.
template <int D, bool kDk, bool kDv>
__global__ void __launch_bounds__(Float32Config<D>::kThreads, 1) attention_backward_dk_dv_float32(BackwardCall call) {
  using Config = Float32Config<D>;
  constexpr int kTile = Config::kTile;
  const Problem problem = call.problem.begin();
  const Block block(problem.heads_kv, ceil_div(problem.S, kTile));  // the heaviest come first
  const int first = block.index * kTile;

  float* const shared = reinterpret_cast<float*>(dynamic_shared());
  const FloatTile<D> k{shared}, v{k.data + Config::kTileFloats}, q{v.data + Config::kTileFloats},
      dout{q.data + Config::kTileFloats};
  float* const p = dout.data + Config::kTileFloats;
  float* const ds = p + (kDv ? Config::kSquareFloats : 0);

  k.load(problem, rows_of<float>(call.k, block.batch, block.head), first, problem.S);
  v.load(problem, rows_of<float>(call.v, block.batch, block.head), first, problem.S);
  Part<D> dk, dv;
  set_zero<D>(dk);
  set_zero<D>(dv);
  // Queries [begin, end) see keys of the block.
  const int begin = max(0, first - problem.position(0)) / kTile * kTile;
  const int end = min(problem.T, first + kTile - 1 + problem.window - problem.position(0));
  for (int in_group = 0; in_group < problem.group; ++in_group) {
    const int head = block.head * problem.group + in_group;
    for (int query = begin; query < end; query += kTile) {
      q.load(problem, rows_of<float>(call.q, block.batch, head), query, problem.T);
      dout.load(problem, rows_of<float>(call.dout, block.batch, head), query, problem.T);
      arrive();
      Square s, dp = {};
      dot<D>(s, q, k);
      if constexpr (kDk) dot<D>(dp, dout, v);
      gradients<D>(s, dp, call, block.batch * problem.heads + head, query, first);
      if constexpr (kDv) write_square<D>(p, s);
      if constexpr (kDk) write_square<D>(ds, dp);
      __syncthreads();
      if constexpr (kDv) multiply_transposed_add<D>(dv, p, dout);
      if constexpr (kDk) multiply_transposed_add<D>(dk, ds, q);
      __syncthreads();  // Q, dO, P and dS are free
    }
  }
  const float scale[4] = {problem.scale, problem.scale, problem.scale, problem.scale};
  const auto dk_rows = rows_of<float>(call.dk, block.batch, block.head);
  const auto dv_rows = rows_of<float>(call.dv, block.batch, block.head);
  if constexpr (kDk) write_rows<D>(problem, dk_rows, first, problem.S, dk, scale);
  const float grow = problem.dropout.grow, grows[4] = {grow, grow, grow, grow};
  if constexpr (kDv) write_rows<D>(problem, dv_rows, first, problem.S, dv, grows);
}

}  // namespace chargpt::cuda
