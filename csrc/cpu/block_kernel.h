// The small operators of a block, compiled once for each instruction set by foreach_isa.h.
//
// All of them wait for memory, so each reads its inputs once and writes its outputs once, and what comes between is
// done a row at a time, in registers and L1. Here stands what they share: bfloat16 is widened as it is read and rounded
// once as it is written, and a sweep walks over a row.

#include "../common/philox.h"
#include "simd/simd.h"
#include "philox.h"

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

template <class T>
struct WideOf {
  using type = T;
};
template <>
struct WideOf<uint16_t> {  // bfloat16
  using type = float;
};
template <class T>
using Wide = typename WideOf<T>::type;

// The first min(n, lanes) elements, and zeros.
template <class T>
CHARGPT_INLINE Vec<Wide<T>> read(const T* p, int n) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return widen(load_half(p, n));
  } else {
    return n >= kLanes<T> ? load<T>(p) : load_first<T>(p, n);
  }
}

template <class T>
CHARGPT_INLINE void write(T* p, Vec<Wide<T>> v, int n) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    store_half(p, narrow(v), n);
  } else if (n >= kLanes<T>) {
    store<T>(p, v);
  } else {
    store_first<T>(p, v, n);
  }
}

// v as reading it back from memory would give it.
template <class T>
CHARGPT_INLINE Vec<Wide<T>> rounded(Vec<Wide<T>> v) {
  if constexpr (std::is_same_v<T, uint16_t>) {
    return widen(narrow(v));
  } else {
    return v;
  }
}

template <class T>
CHARGPT_INLINE T* row_of(const Rows& rows, int64_t row) {
  return static_cast<T*>(const_cast<void*>(rows.data)) + row * rows.stride;
}

// Sums of more vectors than this are made of partial sums, or their rounding errors would add up.
inline constexpr int64_t kRun = 16;

template <class Real>
CHARGPT_INLINE Real reciprocal_root_mean(Real sum_of_squares, int64_t count, double eps) {
  return 1 / std::sqrt(sum_of_squares / static_cast<Real>(count) + static_cast<Real>(eps));
}

template <class X>
CHARGPT_INLINE void square_step(const X* x, Vec<Wide<X>>& squares, int n) {
  const Vec<Wide<X>> s = read(x, n);
  squares += s * s;
}

// Evaluates STEP, an expression in i and n, for each vector of kL elements of [begin, end): the n elements from i on. For
// whole vectors n is a constant, so that the compiler drops the masks.
#define CHARGPT_SWEEP(kL, begin, end, STEP)                            \
  {                                                                    \
    int64_t i = begin;                                                 \
    const int64_t last = end;                                          \
    for (constexpr int n = kL; i + n <= last; i += n) STEP;            \
    if (const int n = static_cast<int>(last - i); n > 0) STEP;         \
  }

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA

#include "block_activation.h"
#include "block_heads.h"
#include "block_norm.h"

#undef CHARGPT_SWEEP

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

constexpr BlockKernels kBlockKernels = {add_norm,           add_norm_backward, qkv_heads,
                                        qkv_heads_backward, activation,        activation_backward};

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
