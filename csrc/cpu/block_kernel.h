// The small operators of a block, compiled once for each instruction set by foreach_isa.h.
//
// All of them wait for memory, so each reads its inputs once and writes its outputs once, and what comes between is
// done a row at a time, in registers and L1:
//   add_rms_norm  s = x + y is written while its squares are added up; a second sweep, over a row that is in L1 (4 KiB
//                 at C = 1024 in float32), multiplies by r = 1 / sqrt(mean(s^2) + eps).
//   its backward  dot = sum(dnormed s), then dx = dsum + r dnormed - s r^3 dot / C.
//   qkv_heads     the same for each head of q and k, whose second sweep also rotates: channels i and i + D/2.
//   its backward  rotates the gradient back in both sweeps, and adds up the squares for r again beside the dot product,
//                 for which it reads the head anyway.
// bfloat16 is widened as it is read and rounded once as it is written.

#include "simd/simd.h"

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
CHARGPT_INLINE Real reciprocal_root_mean(Real sum_of_squares, int64_t count) {
  return 1 / std::sqrt(sum_of_squares / static_cast<Real>(count) + static_cast<Real>(kRmsEps));
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

// ---- add_rms_norm --------------------------------------------------------------------------------------------------

template <class X, class Y>
CHARGPT_INLINE void add_step(const X* x, const Y* y, X* sum, Vec<Wide<X>>& squares, int n) {
  const Vec<Wide<X>> s = rounded<X>(read(x, n) + read(y, n));
  write(sum, s, n);
  squares += s * s;
}

template <class X>
CHARGPT_INLINE void square_step(const X* x, Vec<Wide<X>>& squares, int n) {
  const Vec<Wide<X>> s = read(x, n);
  squares += s * s;
}

template <class X, class Y, class N>
void add_rms_norm_rows(const AddRmsNorm& call, int64_t begin, int64_t end) {
  using Real = Wide<X>;
  constexpr int kL = kLanes<Real>;
  const int64_t C = call.C;
  for (int64_t row = begin; row < end; ++row) {
    const X* x = row_of<const X>(call.x, row);
    const X* s = x;
    Vec<Real> total{};
    if (call.y.data != nullptr) {
      const Y* y = row_of<const Y>(call.y, row);
      X* sum = static_cast<X*>(call.sum) + row * C;
      for (int64_t run = 0; run < C; run += kRun * kL) {
        Vec<Real> squares{};
        CHARGPT_SWEEP(kL, run, std::min(run + kRun * kL, C), add_step(x + i, y + i, sum + i, squares, n))
        total += squares;
      }
      s = sum;
    } else {
      for (int64_t run = 0; run < C; run += kRun * kL) {
        Vec<Real> squares{};
        CHARGPT_SWEEP(kL, run, std::min(run + kRun * kL, C), square_step(x + i, squares, n))
        total += squares;
      }
    }
    const Real r = reciprocal_root_mean(sum_of<Real>(total), C);
    static_cast<Real*>(call.rstd)[row] = r;
    N* normed = static_cast<N*>(call.normed) + row * C;
    CHARGPT_SWEEP(kL, 0, C, write(normed + i, read(s + i, n) * r, n))
  }
}

template <class X, class N>
CHARGPT_INLINE void dot_step(const X* s, const N* dn, Vec<Wide<X>>& dots, int n) {
  dots += read(s, n) * read(dn, n);
}

template <class X, class Y, class N>
CHARGPT_INLINE void dx_step(const X* s, const N* dn, const X* ds, X* dx, Y* dy, Wide<X> r, Wide<X> shrink, int n) {
  Vec<Wide<X>> d = read(dn, n) * r - read(s, n) * shrink;
  if (ds != nullptr) d += read(ds, n);
  write(dx, d, n);
  if (dy != nullptr) write(dy, d, n);
}

template <class X, class Y, class N>
void add_rms_norm_backward_rows(const AddRmsNormBackward& call, int64_t begin, int64_t end) {
  using Real = Wide<X>;
  constexpr int kL = kLanes<Real>;
  const int64_t C = call.C;
  for (int64_t row = begin; row < end; ++row) {
    const X* s = row_of<const X>(call.sum, row);
    const N* dn = row_of<const N>(call.dnormed, row);
    Vec<Real> total{};
    for (int64_t run = 0; run < C; run += kRun * kL) {
      Vec<Real> dots{};
      CHARGPT_SWEEP(kL, run, std::min(run + kRun * kL, C), dot_step(s + i, dn + i, dots, n))
      total += dots;
    }
    const Real r = static_cast<const Real*>(call.rstd)[row];
    const Real shrink = sum_of<Real>(total) / static_cast<Real>(C) * r * r * r;
    X* dx = static_cast<X*>(call.dx) + row * C;
    const X* ds = call.dsum.data == nullptr ? nullptr : row_of<const X>(call.dsum, row);
    Y* dy = call.dy == nullptr ? nullptr : static_cast<Y*>(call.dy) + row * C;
    if (ds != nullptr && dy != nullptr) {
      CHARGPT_SWEEP(kL, 0, C, dx_step(s + i, dn + i, ds + i, dx + i, dy + i, r, shrink, n))
    } else if (ds != nullptr) {
      CHARGPT_SWEEP(kL, 0, C, (dx_step<X, Y>(s + i, dn + i, ds + i, dx + i, nullptr, r, shrink, n)))
    } else if (dy != nullptr) {
      CHARGPT_SWEEP(kL, 0, C, (dx_step<X, Y>(s + i, dn + i, nullptr, dx + i, dy + i, r, shrink, n)))
    } else {
      CHARGPT_SWEEP(kL, 0, C, (dx_step<X, Y>(s + i, dn + i, nullptr, dx + i, nullptr, r, shrink, n)))
    }
  }
}

// Calls rows<X, Y, N> for the dtypes of a call.
#define CHARGPT_FOR_TYPES(rows, call, begin, end)                                                          \
  if (call.x_type == DType::kFloat64) return rows<double, double, double>(call, begin, end);               \
  if (call.x_type == DType::kBFloat16) return rows<uint16_t, uint16_t, uint16_t>(call, begin, end);        \
  const bool half_y = call.y_type == DType::kBFloat16, half_n = call.normed_type == DType::kBFloat16;      \
  if (half_y && half_n) return rows<float, uint16_t, uint16_t>(call, begin, end);                          \
  if (half_y) return rows<float, uint16_t, float>(call, begin, end);                                       \
  if (half_n) return rows<float, float, uint16_t>(call, begin, end);                                       \
  return rows<float, float, float>(call, begin, end)

void add_rms_norm(const AddRmsNorm& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(add_rms_norm_rows, call, begin, end);
}

void add_rms_norm_backward(const AddRmsNormBackward& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(add_rms_norm_backward_rows, call, begin, end);
}

#undef CHARGPT_FOR_TYPES

// ---- qkv_heads -----------------------------------------------------------------------------------------------------

template <class T>
CHARGPT_INLINE void scale_step(const T* x, T* y, Wide<T> factor, int n) {
  write(y, read(x, n) * factor, n);
}

template <class T>
CHARGPT_INLINE void rotate_step(const T* x, T* y, int64_t half, const Wide<T>* cos, const Wide<T>* sin, Wide<T> factor,
                                int n) {
  const Vec<Wide<T>> a = read(x, n) * factor, b = read(x + half, n) * factor, c = read(cos, n), s = read(sin, n);
  write(y, a * c - b * s, n);
  write(y + half, a * s + b * c, n);
}

template <class T, class V>
CHARGPT_INLINE void value_step(const T* x, const V* rows, T* y, int n) {
  write(y, read(x, n) + read(rows, n), n);
}

// One head of q or k.
template <class T>
CHARGPT_INLINE void head_forward(const QkvHeads& heads, const T* x, const Wide<T>* cos, const Wide<T>* sin, T* y) {
  using Real = Wide<T>;
  constexpr int kL = kLanes<Real>;
  const int64_t D = heads.D, half = D / 2;
  Real factor = 1;
  if (heads.norm) {
    Vec<Real> squares{};
    CHARGPT_SWEEP(kL, 0, D, square_step(x + i, squares, n))
    factor = reciprocal_root_mean(sum_of<Real>(squares), D);
  }
  if (cos != nullptr) {
    CHARGPT_SWEEP(kL, 0, half, rotate_step(x + i, y + i, half, cos + i, sin + i, factor, n))
  } else {
    CHARGPT_SWEEP(kL, 0, D, scale_step(x + i, y + i, factor, n))
  }
}

template <class T, class V>
void qkv_heads_rows(const QkvHeads& heads, const QkvHeadsForward& call, int64_t begin, int64_t end) {
  using Real = Wide<T>;
  constexpr int kL = kLanes<Real>;
  const int64_t D = heads.D, queries = heads.H * D, keys = heads.H_kv * D;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<const T>(call.qkv, row);
    if (call.q != nullptr) {
      const int64_t angle = row % heads.T * (D / 2);
      const Real* cos = heads.cos == nullptr ? nullptr : static_cast<const Real*>(heads.cos) + angle;
      const Real* sin = heads.sin == nullptr ? nullptr : static_cast<const Real*>(heads.sin) + angle;
      T* q = static_cast<T*>(call.q) + row * queries;
      for (int64_t j = 0; j < queries; j += D) head_forward(heads, x + j, cos, sin, q + j);
      T* k = static_cast<T*>(call.k) + row * keys;
      for (int64_t j = 0; j < keys; j += D) head_forward(heads, x + queries + j, cos, sin, k + j);
    }
    if (call.v == nullptr) continue;
    const T* values = x + queries + keys;
    T* v = static_cast<T*>(call.v) + row * keys;
    if (call.value_rows.data != nullptr) {
      const V* rows = row_of<const V>(call.value_rows, row);
      CHARGPT_SWEEP(kL, 0, keys, value_step(values + i, rows + i, v + i, n))
    } else {
      std::memcpy(v, values, keys * sizeof(T));
    }
  }
}

// (a, b), the gradient of a pair of channels before the rotation.
template <class T>
struct Pair {
  Vec<Wide<T>> a, b;
};
template <class T>
CHARGPT_INLINE Pair<T> rotated_back(const T* dy, int64_t half, const Wide<T>* cos, const Wide<T>* sin, int n) {
  const Vec<Wide<T>> a = read(dy, n), b = read(dy + half, n), c = read(cos, n), s = read(sin, n);
  return {a * c + b * s, b * c - a * s};
}

// What the norm's gradient needs of a head x with the gradient dy: sums of x^2 and of x dy (before the rotation).
template <class T>
struct HeadSums {
  Vec<Wide<T>> squares{}, dots{};
};
template <class T>
CHARGPT_INLINE void sums_step(const T* x, const T* dy, HeadSums<T>& sums, int n) {
  const Vec<Wide<T>> v = read(x, n);
  sums.squares += v * v;
  sums.dots += v * read(dy, n);
}
template <class T>
CHARGPT_INLINE void rotated_sums_step(const T* x, const T* dy, int64_t half, const Wide<T>* cos, const Wide<T>* sin,
                                      HeadSums<T>& sums, int n) {
  const Vec<Wide<T>> a = read(x, n), b = read(x + half, n);
  const Pair<T> d = rotated_back(dy, half, cos, sin, n);
  sums.squares += a * a + b * b;
  sums.dots += a * d.a + b * d.b;
}

// dx = factor d - shrink x, where d is dy before the rotation. Without the norm factor is 1 and x is not read.
template <class T>
CHARGPT_INLINE void dhead_step(const T* x, const T* dy, T* dx, Wide<T> factor, Wide<T> shrink, int n) {
  Vec<Wide<T>> d = read(dy, n);
  if (x != nullptr) d = d * factor - read(x, n) * shrink;
  write(dx, d, n);
}
template <class T>
CHARGPT_INLINE void rotated_dhead_step(const T* x, const T* dy, T* dx, int64_t half, const Wide<T>* cos,
                                       const Wide<T>* sin, Wide<T> factor, Wide<T> shrink, int n) {
  Pair<T> d = rotated_back(dy, half, cos, sin, n);
  if (x != nullptr) {
    d.a = d.a * factor - read(x, n) * shrink;
    d.b = d.b * factor - read(x + half, n) * shrink;
  }
  write(dx, d.a, n);
  write(dx + half, d.b, n);
}

// One head of q or k. x == nullptr: there is no norm.
template <class T>
CHARGPT_INLINE void head_backward(int64_t D, const T* x, const T* dy, const Wide<T>* cos, const Wide<T>* sin, T* dx) {
  using Real = Wide<T>;
  constexpr int kL = kLanes<Real>;
  const int64_t half = D / 2;
  if (x == nullptr) {
    const Real one = 1, zero = 0;
    if (cos != nullptr) {
      CHARGPT_SWEEP(kL, 0, half, rotated_dhead_step<T>(nullptr, dy + i, dx + i, half, cos + i, sin + i, one, zero, n))
    } else {
      CHARGPT_SWEEP(kL, 0, D, dhead_step<T>(nullptr, dy + i, dx + i, one, zero, n))
    }
    return;
  }
  HeadSums<T> sums;
  if (cos != nullptr) {
    CHARGPT_SWEEP(kL, 0, half, rotated_sums_step(x + i, dy + i, half, cos + i, sin + i, sums, n))
  } else {
    CHARGPT_SWEEP(kL, 0, D, sums_step(x + i, dy + i, sums, n))
  }
  const Real r = reciprocal_root_mean(sum_of<Real>(sums.squares), D);
  const Real shrink = sum_of<Real>(sums.dots) / static_cast<Real>(D) * r * r * r;
  if (cos != nullptr) {
    CHARGPT_SWEEP(kL, 0, half, rotated_dhead_step(x + i, dy + i, dx + i, half, cos + i, sin + i, r, shrink, n))
  } else {
    CHARGPT_SWEEP(kL, 0, D, dhead_step(x + i, dy + i, dx + i, r, shrink, n))
  }
}

template <class T>
CHARGPT_INLINE const T* head_of(const View& view, int64_t b, int64_t h, int64_t t) {
  if (view.data == nullptr) return nullptr;
  return static_cast<const T*>(view.data) + b * view.batch_stride + h * view.head_stride + t * view.time_stride;
}

template <class T, class V>
CHARGPT_INLINE void widened_step(const T* x, V* y, int n) {
  write(y, read(x, n), n);
}

template <class T, class V>
void qkv_heads_backward_rows(const QkvHeads& heads, const QkvHeadsBackward& call, int64_t begin, int64_t end) {
  using Real = Wide<T>;
  constexpr int kL = kLanes<Real>;
  const int64_t D = heads.D, H = heads.H, H_kv = heads.H_kv;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / heads.T, t = row % heads.T, angle = t * (D / 2);
    const Real* cos = heads.cos == nullptr ? nullptr : static_cast<const Real*>(heads.cos) + angle;
    const Real* sin = heads.sin == nullptr ? nullptr : static_cast<const Real*>(heads.sin) + angle;
    const T* x = heads.norm ? row_of<const T>(call.qkv, row) : nullptr;
    T* dx = static_cast<T*>(call.dqkv) + row * (H + 2 * H_kv) * D;
    for (int64_t h = 0; h < H + H_kv; ++h, dx += D) {
      const T* dy = h < H ? head_of<T>(call.dq, b, h, t) : head_of<T>(call.dk, b, h - H, t);
      if (dy == nullptr) {
        std::memset(dx, 0, D * sizeof(T));
      } else {
        head_backward(D, x == nullptr ? nullptr : x + h * D, dy, cos, sin, dx);
      }
    }
    V* dvalue = call.dvalue_rows == nullptr ? nullptr : static_cast<V*>(call.dvalue_rows) + row * H_kv * D;
    for (int64_t h = 0; h < H_kv; ++h, dx += D) {
      const T* dv = head_of<T>(call.dv, b, h, t);
      if (dv == nullptr) {
        std::memset(dx, 0, D * sizeof(T));
        if (dvalue != nullptr) std::memset(dvalue + h * D, 0, D * sizeof(V));
        continue;
      }
      std::memcpy(dx, dv, D * sizeof(T));
      if (dvalue != nullptr) CHARGPT_SWEEP(kL, 0, D, widened_step(dv + i, dvalue + h * D + i, n))
    }
  }
}

#define CHARGPT_FOR_TYPES(rows, heads, call, begin, end)                                                        \
  if (heads.type == DType::kFloat64) return rows<double, double>(heads, call, begin, end);                      \
  if (heads.type == DType::kFloat32) return rows<float, float>(heads, call, begin, end);                        \
  if (heads.value_type == DType::kFloat32) return rows<uint16_t, float>(heads, call, begin, end);               \
  return rows<uint16_t, uint16_t>(heads, call, begin, end)

void qkv_heads(const QkvHeads& heads, const QkvHeadsForward& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(qkv_heads_rows, heads, call, begin, end);
}

void qkv_heads_backward(const QkvHeads& heads, const QkvHeadsBackward& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_TYPES(qkv_heads_backward_rows, heads, call, begin, end);
}

#undef CHARGPT_FOR_TYPES

// ---- relu_squared --------------------------------------------------------------------------------------------------

template <class T>
CHARGPT_INLINE void relu_squared_step(const T* x, T* y, int n) {
  const Vec<Wide<T>> v = read(x, n), positive = v < 0 ? Vec<Wide<T>>{} : v;
  write(y, positive * positive, n);
}

template <class T>
CHARGPT_INLINE void relu_squared_backward_step(const T* x, const T* dy, T* dx, int n) {
  const Vec<Wide<T>> v = read(x, n), d = (v + v) * read(dy, n);
  write(dx, v <= 0 ? Vec<Wide<T>>{} : d, n);
}

template <class T>
void relu_squared_elements(const void* x, void* y, int64_t begin, int64_t end) {
  const T* from = static_cast<const T*>(x);
  T* to = static_cast<T*>(y);
  CHARGPT_SWEEP(kLanes<Wide<T>>, begin, end, relu_squared_step(from + i, to + i, n))
}

template <class T>
void relu_squared_backward_elements(const void* x, const void* dy, void* dx, int64_t begin, int64_t end) {
  const T *from = static_cast<const T*>(x), *given = static_cast<const T*>(dy);
  T* to = static_cast<T*>(dx);
  CHARGPT_SWEEP(kLanes<Wide<T>>, begin, end, relu_squared_backward_step(from + i, given + i, to + i, n))
}

void relu_squared(DType type, const void* x, void* y, int64_t begin, int64_t end) {
  if (type == DType::kFloat64) return relu_squared_elements<double>(x, y, begin, end);
  if (type == DType::kFloat32) return relu_squared_elements<float>(x, y, begin, end);
  return relu_squared_elements<uint16_t>(x, y, begin, end);
}

void relu_squared_backward(DType type, const void* x, const void* dy, void* dx, int64_t begin, int64_t end) {
  if (type == DType::kFloat64) return relu_squared_backward_elements<double>(x, dy, dx, begin, end);
  if (type == DType::kFloat32) return relu_squared_backward_elements<float>(x, dy, dx, begin, end);
  return relu_squared_backward_elements<uint16_t>(x, dy, dx, begin, end);
}

#undef CHARGPT_SWEEP

constexpr BlockKernels kBlockKernels = {add_rms_norm,       add_rms_norm_backward, qkv_heads,
                                        qkv_heads_backward, relu_squared,          relu_squared_backward};

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
