// Tiles of Q, K, V and dO in shared memory and their products on the tensor cores, for 16-bit dtypes.
//
// A row of D elements is D / 8 units of 16 bytes. ldmatrix reads the same unit of eight rows at once, which would hit
// the same banks; so unit u of row r is kept at place u ^ f(r), with f such that those eight reads cover all 32 banks.
// A warp owns a strip: 16 · kM rows of one operand, which its lanes hold as the accumulators of m16n8k16 do (mma.cuh):
// lane 4 g + t has, of each 16 x 8 block, the elements (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).

#pragma once

#include <cstring>
#include <type_traits>

#include "attention_problem.cuh"
#include "mma.cuh"

namespace chargpt::cuda {

__device__ inline int lane_id() { return threadIdx.x % 32; }
__device__ inline int warp_id() { return threadIdx.x / 32; }

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof bits);
  }
  return bits;
}

template <class Element, int D>
struct Tile {
  Element* data;

  static constexpr int kUnits = D / 8;
  static constexpr int kSpan = kUnits % 8 == 0 ? 8 : kUnits % 4 == 0 ? 4 : 2;  // places that f permutes

  __device__ Element* unit(int row, int u) const {
    const int f = static_cast<unsigned>(row) / (8 / kSpan) % kSpan;
    return data + row * D + (u ^ f) * 8;
  }
  __device__ Tile from(int row) const { return {data + row * D}; }  // row: a multiple of 8
  static constexpr int bytes(int rows) { return rows * D * static_cast<int>(sizeof(Element)); }
};

// tile[r] = rows[first + r] for r < count; zeros beyond row `end`, and in the columns that a padded D adds. `threads`
// threads take part, this one as number `thread`; the caller commits, waits, and synchronises.
template <class Element, int D>
__device__ inline void load_tile(const Problem& problem, Tile<Element, D> tile, Rows<const Element> rows, int first,
                                 int count, int end, int thread, int threads) {
  constexpr int kUnits = D / 8;
  for (int i = thread; i < count * kUnits; i += threads) {
    const int row = i / kUnits, column = i % kUnits * 8;
    const bool valid = first + row < end && column < problem.D;
    const Element* from = valid ? rows[first + row] + column : rows.data;
    Element* to = tile.unit(row, i % kUnits);
    if (problem.vectors) {
      cp_async_16(to, from, valid);
    } else {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        uint16_t bits = 0;
        if (valid && column + j < problem.D) memcpy(&bits, from + j, sizeof bits);
        words[j / 2] = j % 2 == 0 ? bits : words[j / 2] | static_cast<uint32_t>(bits) << 16;
      }
      *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

// The 16 · kM rows of a strip as left operands: held in registers, or read again at each use where those are scarce.
template <class Element, int D, int kM, bool kHeld>
struct LeftRows {
  Tile<Element, D> tile;
  uint32_t held[kHeld ? kM : 1][kHeld ? D / 16 : 1][4];

  __device__ void take(Tile<Element, D> strip) {
    tile = strip;
    if constexpr (kHeld) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) read(m, k, held[m][k]);
      }
    }
  }
  __device__ void get(int m, int k, uint32_t (&a)[4]) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = held[m][k][i];
    } else {
      read(m, k, a);
    }
  }

 private:
  __device__ void read(int m, int k, uint32_t (&a)[4]) const {
    ldmatrix_x4(a, tile.unit(16 * m + lane_id() % 16, 2 * k + lane_id() / 16));
  }
};

// Accumulators of a strip with N columns.
template <int kM, int N>
using Accumulators = float[kM][N / 8][4];

template <int kM, int kBlocks>
__device__ inline void set_zero(float (&c)[kM][kBlocks][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[m][n][e] = 0;
    }
  }
}

// c = a bᵀ, for as many rows of b as c has columns
template <class Element, int D, int kM, int kBlocks, bool kHeld>
__device__ inline void multiply_transposed(float (&c)[kM][kBlocks][4], const LeftRows<Element, D, kM, kHeld>& a,
                                           Tile<Element, D> b) {
  const int row = lane_id() / 16 * 8 + lane_id() % 8, unit = lane_id() / 8 % 2;
  set_zero(c);
#pragma unroll
  for (int k = 0; k < D / 16; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.get(m, k, left[m]);
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      uint32_t r[4];
      ldmatrix_x4(r, b.unit(8 * n + row, 2 * k + unit));
      const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(c[m][n], left[m], right[0]);
        mma_m16n8k16<Element>(c[m][n + 1], left[m], right[1]);
      }
    }
  }
}

// c += p b, with p rounded to the dtype of b, for as many rows of b as p has columns
template <class Element, int D, int kM, int kBlocks>
__device__ inline void multiply_add(Accumulators<kM, D>& c, const float (&p)[kM][kBlocks][4], Tile<Element, D> b) {
#pragma unroll
  for (int k = 0; k < kBlocks / 2; ++k) {
    uint32_t left[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = p[m][2 * k + i / 2] + i % 2 * 2;
        left[m][i] = pack<Element>(pair[0], pair[1]);
      }
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, b.unit(16 * k + lane_id() % 16, 2 * n + lane_id() / 16));
      const uint32_t right[2][2] = {{r[0], r[1]}, {r[2], r[3]}};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        mma_m16n8k16<Element>(c[m][2 * n], left[m], right[0]);
        mma_m16n8k16<Element>(c[m][2 * n + 1], left[m], right[1]);
      }
    }
  }
}

// rows[first + r] = factor[row] · c, for the rows before `end`. factor[m][half]: of row 16 m + 8 half + g
template <class Element, int D, int kM>
__device__ inline void write_rows(const Problem& problem, Rows<Element> rows, int first, int end,
                                  const Accumulators<kM, D>& c, const float (&factor)[kM][2]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * m + 8 * half + lane_id() / 4;
      if (row >= end) continue;
      Element* to = rows[row];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        const int column = 8 * n + lane_id() % 4 * 2;
        if (column >= problem.D) continue;
        const float low = factor[m][half] * c[m][n][2 * half], high = factor[m][half] * c[m][n][2 * half + 1];
        const uint32_t pair = pack<Element>(low, high);
        if (problem.pairs) {
          *reinterpret_cast<uint32_t*>(to + column) = pair;
        } else {
          const uint32_t second = pair >> 16;  // little-endian: the lower half comes first
          memcpy(to + column, &pair, sizeof(Element));
          if (column + 1 < problem.D) memcpy(to + column + 1, &second, sizeof(Element));
        }
      }
    }
  }
}

// Dropout of this thread's elements of two 16 x 8 blocks of P, keep[block][element]. One evaluation of Philox serves
// eight keys of one query, of which a thread holds one or two; so each thread evaluates it once, for its neighbours too,
// and they swap words.

// Among the four lanes that differ in the two bits from `stride` on, of which this is number `lane`: word j of lane i
// becomes word i of lane j.
__device__ inline void transpose_words(uint32_t (&word)[4], int lane, int stride) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (lane & bit) != 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (e & bit) continue;
      const uint32_t got = __shfl_xor_sync(0xFFFFFFFF, upper ? word[e] : word[e + bit], stride * bit);
      word[e] = upper ? got : word[e];
      word[e + bit] = upper ? word[e + bit] : got;
    }
  }
}

// Rows are queries, the first of them at `position`; columns are keys, a multiple of 8 and on: the second block's follow
// the first's. The lanes of a row need two evaluations of theirs for each block, and word t of all four is for lane t.
template <int kTogether = kPhiloxRounds>
__device__ inline void keep_by_query(bool (&keep)[2][4], const Dropout& dropout, int batch_head, int position,
                                     int key) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t word[4];
  random_words<kTogether>(word, dropout, key / 8 + t / 2, position + g + t % 2 * 8, batch_head);
  transpose_words(word, t, 1);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    keep[i / 2][i % 2 * 2] = dropout.keeps_low(word[i]);
    keep[i / 2][i % 2 * 2 + 1] = dropout.keeps_high(word[i]);
  }
}

// Rows are keys; columns are queries, the first of them at `position`: the second block's follow the first's. The eight
// lanes with equal t need eight evaluations: for each block, half of the keys, and parity of the query, in this order.
// Half g of all is for lane g, so they swap words first, and then the halves of a pair of lanes.
__device__ inline void keep_by_key(bool (&keep)[2][4], const Dropout& dropout, int batch_head, int position, int key) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t word[4];
  random_words(word, dropout, key / 8 + g / 2 % 2, position + g / 4 * 8 + 2 * t + g % 2, batch_head);
  transpose_words(word, g / 2, 8);
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    const uint32_t first = word[2 * block], second = word[2 * block + 1];  // of the two halves of the keys
    const uint32_t lower = (first & 0xFFFF) | second << 16, upper = first >> 16 | (second & 0xFFFF0000);
    const bool odd = g % 2 == 1;
    const uint32_t own = odd ? upper : lower, got = __shfl_xor_sync(0xFFFFFFFF, odd ? lower : upper, 4);
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      const uint32_t pair = odd == (parity == 1) ? own : got;
      keep[block][parity] = dropout.keeps_low(pair);
      keep[block][2 + parity] = dropout.keeps_high(pair);
    }
  }
}

}  // namespace chargpt::cuda
