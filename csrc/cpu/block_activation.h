// The activations between the two products of an MLP, for one instruction set; included by block_kernel.h.
//
// GELU needs the normal distribution's Phi and density phi. One exponential gives both: phi(x) = e^(-x^2 / 2) / sqrt(2 pi),
// and Phi(-|x|) = e^(-x^2 / 2) P(t), t = 1 / (1 + 0.27 |x|), as in Abramowitz and Stegun 7.1.26. P was fitted to
// |x| <= 14, where the exponential underflows in float32: relative error 2.4e-8. float64 takes std::erfc.

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

// What an activation makes of x, and its slope there.
template <class V>
struct Curve {
  V value, slope;
};

template <class Real>
CHARGPT_INLINE Vec<Real> sigmoid(Vec<Real> x) {  // of both signs from e^-|x|, which cannot overflow
  constexpr Real kLowest = sizeof(Real) == 4 ? -87 : -708;  // where exponential() stops
  const Vec<Real> e = exponential(x < 0 ? x : -x), smaller = e / (1 + e);
  return x < kLowest ? Vec<Real>{} : x < 0 ? smaller : 1 - smaller;
}

CHARGPT_INLINE Vec<float> lower_tail(Vec<float> x, Vec<float> bell) {  // Phi(-|x|)
  constexpr float kC[] = {0.107720181f,  0.107550502f, 0.101759195f,  0.0722401589f, 0.107399747f,
                          -0.0686214492f, 0.169291824f, -0.126255468f, 0.0289153177f};
  const Vec<float> t = 1 / (1 + (x < 0 ? -x : x) * 0.27f);
  Vec<float> p = broadcast(kC[8]);
#pragma GCC unroll 8
  for (int i = 7; i >= 0; --i) p = p * t + kC[i];
  return p * t * bell;
}
CHARGPT_INLINE Vec<double> lower_tail(Vec<double> x, Vec<double>) {
  Vec<double> tail;
  for (int i = 0; i < kLanes<double>; ++i) tail[i] = 0.5 * std::erfc(std::abs(x[i]) * 0.70710678118654752);
  return tail;
}

// x within the range where a bell or a sigmoid is not yet flat, so that a large x does not make 0 * infinity.
template <class Real>
CHARGPT_INLINE Vec<Real> clipped(Vec<Real> x) {
  constexpr Real kFlat = sizeof(Real) == 4 ? 14 : 40;
  x = x > kFlat ? Vec<Real>{} + kFlat : x;
  return x < -kFlat ? Vec<Real>{} - kFlat : x;
}

template <Activation kKind, class Real>
CHARGPT_INLINE Curve<Vec<Real>> curve(Vec<Real> x) {
  using V = Vec<Real>;
  if constexpr (kKind == Activation::kRelu) {
    return {x < 0 ? V{} : x, x <= 0 ? V{} : V{} + 1};
  } else if constexpr (kKind == Activation::kReluSquared) {
    const V positive = x < 0 ? V{} : x;
    return {positive * positive, x <= 0 ? V{} : x + x};
  } else if constexpr (kKind == Activation::kGelu) {
    const V bell = exponential(x * x * static_cast<Real>(-0.5)), tail = lower_tail(x, bell);
    const V below = x < 0 ? tail : 1 - tail;
    return {x * below, below + clipped<Real>(x) * bell * static_cast<Real>(0.39894228040143268)};
  } else if constexpr (kKind == Activation::kGeluTanh) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    constexpr Real kTwice = static_cast<Real>(1.5957691216057308), kCube = static_cast<Real>(0.044715);
    const V s = sigmoid<Real>(x * kTwice * (1 + x * x * kCube)), near = clipped<Real>(x);
    return {x * s, s + near * s * (1 - s) * kTwice * (1 + near * near * (3 * kCube))};
  } else {  // SiLU, the gate of SwiGLU
    const V s = sigmoid<Real>(x);
    return {x * s, s * (1 + x * (1 - s))};
  }
}

template <Activation kKind, class T>
CHARGPT_INLINE void activation_step(const T* x, const T* other, T* y, int n) {
  Vec<Wide<T>> value = curve<kKind, Wide<T>>(read(x, n)).value;
  if constexpr (kKind == Activation::kSwiglu) value = value * read(other, n);
  write(y, value, n);
}

template <Activation kKind, class T>
CHARGPT_INLINE void activation_backward_step(const T* x, const T* other, const T* dy, T* dx, T* dother, int n) {
  const Curve<Vec<Wide<T>>> at = curve<kKind, Wide<T>>(read(x, n));
  Vec<Wide<T>> given = read(dy, n);
  if constexpr (kKind == Activation::kSwiglu) {
    write(dother, given * at.value, n);
    given = given * read(other, n);
  }
  Vec<Wide<T>> d = given * at.slope;
  if constexpr (kKind == Activation::kRelu || kKind == Activation::kReluSquared) d = at.slope == 0 ? Vec<Wide<T>>{} : d;
  write(dx, d, n);
}

// Elements [begin, end), or rows of SwiGLU.
template <Activation kKind, class T>
void activation_range(const ActivationCall& call, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(call.x);
  T* y = static_cast<T*>(call.y);
  if constexpr (kKind != Activation::kSwiglu) {
    CHARGPT_SWEEP(kLanes<Wide<T>>, begin, end, (activation_step<kKind, T>(x + i, nullptr, y + i, n)))
  } else {
    const int64_t width = call.width;
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = x + row * 2 * width;
      T* to = y + row * width;
      CHARGPT_SWEEP(kLanes<Wide<T>>, 0, width, (activation_step<kKind>(gate + i, gate + width + i, to + i, n)))
    }
  }
}

template <Activation kKind, class T>
void activation_backward_range(const ActivationCall& call, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(call.x), *dy = static_cast<const T*>(call.dy);
  T* dx = static_cast<T*>(call.dx);
  if constexpr (kKind != Activation::kSwiglu) {
    CHARGPT_SWEEP(kLanes<Wide<T>>, begin, end,
                  (activation_backward_step<kKind, T>(x + i, nullptr, dy + i, dx + i, nullptr, n)))
  } else {
    const int64_t width = call.width;
    for (int64_t row = begin; row < end; ++row) {
      const T *gate = x + row * 2 * width, *given = dy + row * width;
      T* to = dx + row * 2 * width;
      CHARGPT_SWEEP(kLanes<Wide<T>>, 0, width,
                    (activation_backward_step<kKind>(gate + i, gate + width + i, given + i, to + i, to + width + i, n)))
    }
  }
}

#define CHARGPT_FOR_TYPES(rows, kind)                                                                     \
  case kind:                                                                                              \
    if (call.type == DType::kFloat64) return rows<kind, double>(call, begin, end);                        \
    if (call.type == DType::kFloat32) return rows<kind, float>(call, begin, end);                         \
    return rows<kind, uint16_t>(call, begin, end)
#define CHARGPT_FOR_KINDS(rows)                             \
  switch (call.kind) {                                      \
    CHARGPT_FOR_TYPES(rows, Activation::kRelu);             \
    CHARGPT_FOR_TYPES(rows, Activation::kReluSquared);      \
    CHARGPT_FOR_TYPES(rows, Activation::kGelu);             \
    CHARGPT_FOR_TYPES(rows, Activation::kGeluTanh);         \
    CHARGPT_FOR_TYPES(rows, Activation::kSwiglu);           \
    case Activation::kNone:                                 \
      return;                                               \
  }

void activation(const ActivationCall& call, int64_t begin, int64_t end) { CHARGPT_FOR_KINDS(activation_range) }

void activation_backward(const ActivationCall& call, int64_t begin, int64_t end) {
  CHARGPT_FOR_KINDS(activation_backward_range)
}

#undef CHARGPT_FOR_KINDS
#undef CHARGPT_FOR_TYPES

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
