// Causal attention for float32, forward and backward, on the ordinary units: the tensor cores would round to 10 bits.
// The algorithm, and the reason for two backward kernels, are those of attention_forward.cuh and
// attention_backward.cuh.
//
// A block makes tiles of S of kTile queries x kTile keys, kTile = 64 or 32, with (kTile / 4)² threads: thread (y, x)
// has queries 4 y … 4 y + 3, keys 4 x … 4 x + 3, so that one evaluation of Philox decides for its four keys of a query.
// Of O, or a gradient, it has rows 4 y … 4 y + 3 and kGroups groups of kVector neighbouring columns. Between the two
// products P, or dS, goes through shared memory. Each float4 read there serves four multiplications at least, sixteen
// where D / kX is a multiple of 4.
//
// Shared memory: 3 tiles of kTile x D and one of kTile x (kTile + 4) forward, 64 KiB at D = 64; one tile more for dQ;
// two more for dK and dV, 98 KiB at D = 64, 133 KiB at D = 256, which chips with 99 KiB a block (sm_86, sm_89, sm_120)
// lack.

#pragma once

#include "attention_problem.cuh"
#include "mma.cuh"

namespace chargpt::cuda {

template <int D>
struct Float32Config {
  static constexpr int kTile = D <= 64 ? 64 : 32;
  static constexpr int kX = kTile / 4, kThreads = kX * kX;
  static constexpr int kVector = D / kX < 4 ? D / kX : 4, kGroups = D / (kX * kVector);
  static constexpr bool kTogether = D <= 128;  // dK and dV in one go, as far as registers allow; else a launch for each
  static constexpr int kTileFloats = kTile * D;
  static constexpr int kPitch = kTile + 4, kSquareFloats = kTile * kPitch;  // of P and dS
};

// D                                 16    32    64    96   128   256
//   threads                        256   256   256    64    64    64
//   registers, sm_90a: forward      96   120   128   160   168   240
//                      dq          102   128   132   168   202   254
//                      dk_dv        93   128   150   218   252   254
// budget: attention_forward_float32<64> registers<=128 shared<=0
// budget: attention_forward_float32 registers<=255 shared<=0
// budget: attention_backward_dq_float32 registers<=255 shared<=0
// budget: attention_backward_dk_dv_float32 registers<=255 shared<=0

// kTile rows of D channels in shared memory. A unit of four channels is kept at a place that depends on row / 4, so
// that threads x = 0 … 7, which read the same unit of rows 4 x + j, hit different banks (from D = 32 on).
template <int D>
struct FloatTile {
  float* data;

  static constexpr int kUnits = D / 4, kSpan = kUnits < 8 ? kUnits : 8;

  __device__ float* at(int row, int column) const {
    const int f = static_cast<unsigned>(row) / 4 % kSpan;
    return data + row * D + ((column / 4) ^ f) * 4 + column % 4;
  }

  // at(r) = rows[first + r], zeros beyond row `end` and behind the last channel. The caller commits and waits.
  __device__ void load(const Problem& problem, Rows<const float> rows, int first, int end) const {
    using Config = Float32Config<D>;
    const int width = problem.vectors ? 4 : 1;
#pragma unroll 1  // unrolled, its addresses would take registers that the products need
    for (int i = threadIdx.x; i < Config::kTileFloats / width; i += Config::kThreads) {
      const int row = i * width / D, column = i * width % D;
      const bool valid = first + row < end && column < problem.D;
      const float* from = valid ? rows[first + row] + column : rows.data;
      if (problem.vectors) {
        cp_async_16(at(row, column), from, valid);
      } else {
        cp_async_4(at(row, column), from, valid);
      }
    }
  }
};

__device__ inline void arrive() {
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
}

template <int N>
__device__ inline void read(float (&to)[N], const float* from) {  // `from`: at a multiple of N floats
  if constexpr (N == 4) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
  } else if constexpr (N == 2) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    to[0] = x.x, to[1] = x.y;
  } else {
    to[0] = *from;
  }
}

using Square = float[4][4];  // a thread's part of S: (query, key)
template <int D>
using Part = float[4][Float32Config<D>::kGroups][Float32Config<D>::kVector];  // of O, dQ …: (row, group, column)

// This thread's place.
template <int D>
struct Place {
  using Config = Float32Config<D>;
  int y, x;
  __device__ Place() : y(threadIdx.x / Config::kX), x(threadIdx.x % Config::kX) {}
  __device__ int column(int group) const { return (group * Config::kX + x) * Config::kVector; }
};

// s = the products of rows 4 y + i of a and rows 4 x + j of b. Added up in runs of kRun channels: with runs of 8 the
// partial sums of 64 channels are, squared and added up, a quarter of those of a single run, and so is the variance of
// rounding.
template <int D>
__device__ inline void dot(Square& s, FloatTile<D> a, FloatTile<D> b) {
  const Place<D> place;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = 0;
  }
#pragma unroll 1
  for (int run = 0; run < D; run += kRun) {
    Square sum = {};
#pragma unroll 1
    for (int channel = 0; channel < kRun; channel += 4) {
      const float* const from_a = a.at(4 * place.y, run + channel);  // these four rows keep a unit at the same place
      const float* const from_b = b.at(4 * place.x, run + channel);
      float left[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) read(left[i], from_a + i * D);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float right[4];
        read(right, from_b + j * D);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int d = 0; d < 4; ++d) sum[i][j] += left[i][d] * right[d];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] += sum[i][j];
    }
  }
}

// sum += weight[i] · b[k], for kVector columns
template <int D>
__device__ inline void add_row(float (&sum)[4][Float32Config<D>::kVector], const float (&weight)[4], FloatTile<D> b,
                               int k, int column) {
  float row[Float32Config<D>::kVector];
  read(row, b.at(k, column));
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < Float32Config<D>::kVector; ++n) sum[i][n] += weight[i] * row[n];
  }
}

template <int D>
__device__ inline void add(Part<D>& c, int group, const float (&sum)[4][Float32Config<D>::kVector]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int n = 0; n < Float32Config<D>::kVector; ++n) c[i][group][n] += sum[i][n];
  }
}

// The two products below add up one tile before they add it to c, for the same reason, and one group of columns after
// the other, for its sums to stay in few registers.

// c += p b: weights of rows 4 y + i
template <int D>
__device__ inline void multiply_add(Part<D>& c, const float* p, FloatTile<D> b) {
  using Config = Float32Config<D>;
  const Place<D> place;
  const float* const rows = p + 4 * place.y * Config::kPitch;
#pragma unroll
  for (int g = 0; g < Config::kGroups; ++g) {
    float sum[4][Config::kVector] = {};
#pragma unroll 1
    for (int k = 0; k < Config::kTile; k += 4) {
      float weights[4][4];  // (row, k)
#pragma unroll
      for (int i = 0; i < 4; ++i) read(weights[i], rows + i * Config::kPitch + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight[4] = {weights[0][j], weights[1][j], weights[2][j], weights[3][j]};
        add_row<D>(sum, weight, b, k + j, place.column(g));
      }
    }
    add<D>(c, g, sum);
  }
}

// c += pᵀ b: weights of columns 4 y + i
template <int D>
__device__ inline void multiply_transposed_add(Part<D>& c, const float* p, FloatTile<D> b) {
  using Config = Float32Config<D>;
  const Place<D> place;
#pragma unroll
  for (int g = 0; g < Config::kGroups; ++g) {
    float sum[4][Config::kVector] = {};
#pragma unroll 4
    for (int k = 0; k < Config::kTile; ++k) {
      float weight[4];
      read(weight, p + k * Config::kPitch + 4 * place.y);
      add_row<D>(sum, weight, b, k, place.column(g));
    }
    add<D>(c, g, sum);
  }
}

template <int D>
__device__ inline void set_zero(Part<D>& c) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int g = 0; g < Float32Config<D>::kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < Float32Config<D>::kVector; ++n) c[i][g][n] = 0;
    }
  }
}

template <int D>
__device__ inline void write_square(float* to, const Square& s) {
  const Place<D> place;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float4*>(to + (4 * place.y + i) * Float32Config<D>::kPitch + 4 * place.x) =
        make_float4(s[i][0], s[i][1], s[i][2], s[i][3]);
  }
}

// rows[first + 4 y + i] = factor[i] · c[i], for rows before `end`
template <int D>
__device__ inline void write_rows(const Problem& problem, Rows<float> rows, int first, int end, const Part<D>& c,
                                  const float (&factor)[4]) {
  const Place<D> place;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = first + 4 * place.y + i;
    if (row >= end) continue;
#pragma unroll
    for (int g = 0; g < Float32Config<D>::kGroups; ++g) {
#pragma unroll
      for (int n = 0; n < Float32Config<D>::kVector; ++n) {
        const int column = place.column(g) + n;
        if (column < problem.D) rows[row][column] = factor[i] * c[i][g][n];
      }
    }
  }
}

// Which tiles of keys queries [first, first + kTile) see: [begin, end)
template <int D>
struct KeyTiles {
  int begin, end;
  __device__ KeyTiles(const Problem& problem, int first) {
    constexpr int kTile = Float32Config<D>::kTile;
    begin = max(0, problem.position(first) - problem.window + 1) / kTile;
    end = problem.position(min(first + kTile, problem.T) - 1) / kTile + 1;
  }
};

__device__ inline bool sees(const Problem& problem, int query, int key) {
  const int distance = problem.position(query) - key;
  return distance >= 0 && distance < problem.window;
}

// Whether all of `count` queries see all of `count` keys.
__device__ inline bool all_see(const Problem& problem, int query, int key, int count) {
  return sees(problem, query, key + count - 1) && sees(problem, query + count - 1, key);
}

// Which of this thread's keys of a query survive dropout.
__device__ inline void keep_keys(bool (&keep)[4], const Problem& problem, int batch_head, int query, int key) {
  uint32_t word[4];
  random_words(word, problem.dropout, key / 4, problem.position(query), batch_head);
#pragma unroll
  for (int j = 0; j < 4; ++j) keep[j] = word[j] >= problem.dropout.threshold;
}

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
  const Problem& problem = call.problem;
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
  const Problem& problem = call.problem;
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
  const Problem& problem = call.problem;
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
  const Problem& problem = call.problem;
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
