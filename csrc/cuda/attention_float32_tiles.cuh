// Tiles of causal attention in float32: who has which part of them, and their products.
//
// A block makes tiles of S of kTile queries x kTile keys, kTile = 64 or 32, with (kTile / 4)² threads: thread (y, x)
// has queries 4 y … 4 y + 3, keys 4 x … 4 x + 3, so that one evaluation of Philox decides for its four keys of a query.
// Of O, or a gradient, it has rows 4 y … 4 y + 3 and kGroups groups of kVector neighbouring columns. Between the two
// products P, or dS, goes through shared memory. Each float4 read there serves four multiplications at least, sixteen
// where D / kX is a multiple of 4.

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

// Which of this thread's four keys of a query survive dropout; the first of them is `key`, a multiple of 4.
__device__ inline void keep_keys(bool (&keep)[4], const Problem& problem, int batch_head, int query, int key) {
  uint32_t word[4];
  random_words<1>(word, problem.dropout, key / 8, problem.position(query), batch_head);
  const bool second = key / 4 % 2 == 1;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t mine = second ? word[2 + j] : word[j];
    keep[2 * j] = problem.dropout.keeps_low(mine);
    keep[2 * j + 1] = problem.dropout.keeps_high(mine);
  }
}

}  // namespace chargpt::cuda
