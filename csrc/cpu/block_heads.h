// q, k and v of packed projections, for one instruction set; included by block_kernel.h.
//
//   forward   a head of q or k adds up its squares, then a second sweep scales and rotates: channels i and i + D/2.
//   backward  rotates the gradient back in both sweeps, and adds up the squares again beside the dot product, for which
//             it reads the head anyway.

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

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
    factor = reciprocal_root_mean(sum_of<Real>(squares), D, kRmsEps);
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
  const Real r = reciprocal_root_mean(sum_of<Real>(sums.squares), D, kRmsEps);
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

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
