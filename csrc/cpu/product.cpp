// Chooses the instruction set of product_kernel.h, and divides the work: into blocks of 64 rows of C.

#include "product.h"

#include <atomic>
#include <cstdlib>

#include "simd/isa.h"

namespace chargpt::cpu {
namespace {

struct ProductCall {
  TransposedProduct product;
  void* packed;  // B
  std::atomic<bool>* out_of_memory;
};

struct ProductKernels {
  Items pack, multiply;  // an item is a tile of rows of B, and a block of rows of C
  int64_t (*packed_bytes)(const TransposedProduct& product);
};

}  // namespace
}  // namespace chargpt::cpu

#define CHARGPT_KERNEL "../product_kernel.h"
#define CHARGPT_BFLOAT16_ALONE
#include "simd/foreach_isa.h"

namespace chargpt::cpu {
namespace {

using plain::kTile;

ProductKernels kernels() {
#if defined(__x86_64__)
  if (has_amx()) return amx::product_kernels();
  switch (best_isa()) {
    case Isa::kAvx512Bf16:
      return avx512_bf16::product_kernels();
    case Isa::kAvx512:
      return avx512::product_kernels();
    case Isa::kAvx2:
      return avx2::product_kernels();
    default:
      break;
  }
#elif defined(CHARGPT_COMPILES_NEON_BF16)
  if (has_neon_bf16()) return neon_bf16::product_kernels();
#endif
  return plain::product_kernels();
}

}  // namespace

bool add_transposed_product(const TransposedProduct& product, ParallelFor parallel_for) {
  if (product.K == 0 || product.M == 0 || product.N == 0) return true;
  const ProductKernels chosen = kernels();
  void* const packed = std::aligned_alloc(64, chosen.packed_bytes(product));
  if (packed == nullptr) return false;
  std::atomic<bool> out_of_memory{false};
  ProductCall call{product, packed, &out_of_memory};
  run(parallel_for, (product.K + kTile - 1) / kTile, chosen.pack, &call);
  run(parallel_for, (product.M + kTile - 1) / kTile, chosen.multiply, &call);
  std::free(packed);
  return !out_of_memory;
}

const char* product_isa() {
  return has_amx() ? "amx" : has_neon_bf16() ? "neon_bf16" : isa_name(best_isa());
}

}  // namespace chargpt::cpu
