// Tensors as rows, for the small operators of a block, cpu/block.h.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "../cpu/block.h"
#include "common.h"

namespace chargpt::bindings {

constexpr int64_t kGrain = 16384;  // elements: fewer are not worth a thread

// x (..., C) as rows, each contiguous: x itself where its strides allow it, else a copy, which `kept` holds.
struct RowsOf {
  Tensor kept;
  cpu::Rows rows;

  explicit RowsOf(const Tensor& x) : kept(x) {
    if (!x.defined()) return;
    if (!x.is_contiguous()) {  // reshape costs a microsecond
      kept = x.reshape({-1, x.size(-1)});
      if (kept.stride(1) != 1 && kept.size(1) != 1) kept = kept.contiguous();
    }
    rows = {kept.const_data_ptr(), x.is_contiguous() ? x.size(-1) : kept.stride(0)};
  }
};

inline Tensor packed_like(const Tensor& x, at::ScalarType type) {
  return at::empty(x.sizes(), x.options().dtype(type));
}

// Runs f(begin, end) over rows of so many elements.
template <class F>
void for_rows(int64_t rows, int64_t elements, const F& f) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kGrain / elements), f);
}

}  // namespace chargpt::bindings
