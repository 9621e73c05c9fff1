// The product that torch lacks: of bfloat16 matrices, added to float32. The gradient of a weight is such a sum, over
// parts of its rows. Torch-free; product.cpp implements it.

#pragma once

#include <cstdint>

#include "parallel.h"

namespace chargpt::cpu {

// C (M, N) += Aᵀ B. Rows are contiguous, strides count elements, K, M, N ≥ 0; C overlaps neither A nor B.
struct TransposedProduct {
  int64_t K, M, N;
  const uint16_t* a;  // (K, M), bfloat16
  int64_t a_stride;
  const uint16_t* b;  // (K, N), bfloat16
  int64_t b_stride;
  float* c;
  int64_t c_stride;
};

// Products are summed in float32, rows of A and B in ascending order, and the whole sum is added to C. Bitwise the same
// whatever ranges parallel_for makes. Returns false when scratch memory cannot be had (a copy of B, and N numbers for
// each of 64 rows of C and each thread); some of C may then have changed.
[[nodiscard]] bool add_transposed_product(const TransposedProduct& product, ParallelFor parallel_for);

// The code path that runs on this CPU, as attention_isa says it for bfloat16.
const char* product_isa();

}  // namespace chargpt::cpu
