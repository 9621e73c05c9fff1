// The product of cpu/product.h for torch. Part of `chargpt._native`.

#include "../cpu/product.h"
#include "common.h"
#include "parallel.h"

namespace chargpt::bindings {
namespace {

void add_transposed_product_(const Tensor& c, const Tensor& a, const Tensor& b) {
  const py::gil_scoped_release nogil;
  const auto is_rows = [](const Tensor& x) { return x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1); };
  TORCH_CHECK(is_rows(a) && is_rows(b) && is_rows(c), "the matrices' rows must be contiguous");
  TORCH_CHECK(a.scalar_type() == at::kBFloat16 && b.scalar_type() == at::kBFloat16 && c.scalar_type() == at::kFloat,
              "bfloat16 is added to float32");
  TORCH_CHECK(a.size(0) == b.size(0) && c.size(0) == a.size(1) && c.size(1) == b.size(1), "the shapes do not fit");
  const cpu::TransposedProduct product{.K = a.size(0),
                                       .M = a.size(1),
                                       .N = b.size(1),
                                       .a = static_cast<const uint16_t*>(a.const_data_ptr()),
                                       .a_stride = a.stride(0),
                                       .b = static_cast<const uint16_t*>(b.const_data_ptr()),
                                       .b_stride = b.stride(0),
                                       .c = c.data_ptr<float>(),
                                       .c_stride = c.stride(0)};
  TORCH_CHECK_WITH(OutOfMemoryError, cpu::add_transposed_product(product, &parallel_for),
                   "no memory for the scratch space of a product");
}

}  // namespace

void define_product(py::module_& m) {
  m.def("product_isa", &cpu::product_isa, "The code path that products of bfloat16 take on this CPU.");
  m.def("add_transposed_product_", &add_transposed_product_, "c (M, N) += aᵀ b, for a (K, M) and b (K, N).");
}

}  // namespace chargpt::bindings
