// Softmax cross-entropy of float and BFloat16 rows for one instruction set: what cross_entropy.cpp explains, in vectors.
// Compiled by foreach_isa.h from AVX2 on; the plain path, and double, are the scalar code in cross_entropy.cpp.

#include "simd/simd.h"

#if CHARGPT_ISA_LEVEL >= 1

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

// Rows of float, and of BFloat16 widened to it.
CHARGPT_INLINE Vec<float> load_row(const float* p) { return load<float>(p); }
CHARGPT_INLINE Vec<float> load_row(const BFloat16* p) { return widen(load_half(&p->bits, kLanes<float>)); }
CHARGPT_INLINE Vec<float> load_row_first(const float* p, int n) { return load_first<float>(p, n); }
CHARGPT_INLINE Vec<float> load_row_first(const BFloat16* p, int n) { return widen(load_half(&p->bits, n)); }
CHARGPT_INLINE void store_row(float* p, Vec<float> x) { store<float>(p, x); }
CHARGPT_INLINE void store_row(BFloat16* p, Vec<float> x) { store_half(&p->bits, narrow_again(x), kLanes<float>); }
CHARGPT_INLINE void store_row_first(float* p, Vec<float> x, int n) { store_first<float>(p, x, n); }
CHARGPT_INLINE void store_row_first(BFloat16* p, Vec<float> x, int n) { store_half(&p->bits, narrow_again(x), n); }
CHARGPT_INLINE void stream_row(float* p, Vec<float> a, Vec<float> b) { stream(p, a, b); }
CHARGPT_INLINE void stream_row(BFloat16* p, Vec<float> a, Vec<float> b) { stream(&p->bits, narrow_again(a), narrow_again(b)); }

// exp(d) for d <= 0, to 1.5 units in the last place: 2^t with t = d log2(e) = n + f, |f| <= 1/2, and 2^f = 1 + f q(f)
// by a minimax polynomial (relative error 9.2e-8). exp(0) is exactly 1. The product d log2(e) is rounded, so exp(d) is
// off by |d| 6e-8 relative; relative to the row's largest term, which is 1, that is at most 0.37 * 6e-8.
CHARGPT_INLINE Vec<float> exp_negative(Vec<float> d) {
  const Vec<float> t = rounded(d * 1.44269504f);  // t - f must be a whole number
  const Vec<float> f = fraction(t);
  Vec<float> q = broadcast(1.3264714988e-03f);
  q = fused(q, f, broadcast(9.6715135107e-03f));
  q = fused(q, f, broadcast(5.5507337838e-02f));
  q = fused(q, f, broadcast(2.4022242066e-01f));
  q = fused(q, f, broadcast(6.9314697757e-01f));
  return scale_by_power(fused(q, f, broadcast(1.0f)), t, f);
}

// log(x) for normal x > 0; NaN gives NaN. log(mantissa) = 2 artanh(s) with s = (mantissa - 1) / (mantissa + 1), |s| <= 0.2.
CHARGPT_INLINE Vec<float> log_positive(Vec<float> x) {
  Vec<float> exponent, mantissa;
  split(x, &exponent, &mantissa);
  const Vec<float> s = (mantissa - 1.0f) / (mantissa + 1.0f);
  const Vec<float> s2 = rounded(s * s);
  Vec<float> series = broadcast(2.0f / 9);
  series = fused(series, s2, broadcast(2.0f / 7));
  series = fused(series, s2, broadcast(2.0f / 5));
  series = fused(series, s2, broadcast(2.0f / 3));
  const Vec<float> log_mantissa = fused(rounded(series * s2), s, s + s);
  const Vec<float> nothing = x - x;  // 0, or NaN
  return fused(exponent, broadcast(0.693147181f), log_mantissa) + nothing;
}

// tanh(u). Small arguments by the odd Taylor-like minimax polynomial, since 1 - 2 / (exp(2 u) + 1) would cancel.
CHARGPT_INLINE Vec<float> tanh_of(Vec<float> u) {
  const Vec<float> size = magnitude(u), square = rounded(u * u);
  Vec<float> p = broadcast(-5.70498872745e-3f);
  p = fused(p, square, broadcast(2.06390887954e-2f));
  p = fused(p, square, broadcast(-5.37397155531e-2f));
  p = fused(p, square, broadcast(1.33314422036e-1f));
  p = fused(p, square, broadcast(-3.33332819422e-1f));
  const Vec<float> small = fused(rounded(p * square), size, size);
  const Vec<float> e = exp_negative(size * -2.0f);
  const Vec<float> large = (1.0f - e) / (1.0f + e);
  return with_sign(size < 0.625f ? small : large, u);
}

// Rounded, so that x - m is exactly 0 for the largest x.
CHARGPT_INLINE Vec<float> cap(Vec<float> x, Vec<float> softcap, Vec<float> inverse) {
  return rounded(softcap * tanh_of(rounded(x * inverse)));
}

inline float capped(float x, float softcap) {
  if (softcap == 0) return x;
  return cap(broadcast(x), broadcast(softcap), broadcast(1 / softcap))[0];
}

// In one order, that of a tree: halves, quarters …
CHARGPT_INLINE float tree_sum_of(Vec<float> x) {
#if CHARGPT_ISA_LEVEL >= 2
  return sum_of<float>(x);
#else
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#endif
}

template <bool kCap>
struct Shift {  // x - m, after the softcap
  Vec<float> m, c, inverse;
  CHARGPT_INLINE Vec<float> operator()(Vec<float> x) const { return (kCap ? cap(x, c, inverse) : x) - m; }
};

template <bool kCap, class T>
RowSums<float> scan_row(const T* x, int64_t V, float softcap, bool with_shifted) {
  constexpr int kChains = 4;  // independent chains hide the latency of maximum and addition
  constexpr int kStep = kLanes<float>;
  const Vec<float> minus_infinity = broadcast(-std::numeric_limits<float>::infinity());
  Vec<float> top[kChains] = {minus_infinity, minus_infinity, minus_infinity, minus_infinity};
  int64_t j = 0;
  for (; j + kChains * kStep <= V; j += kChains * kStep) {
    for (int k = 0; k < kChains; ++k) top[k] = maximum<float>(load_row(x + j + k * kStep), top[k]);
  }
  for (; j + kStep <= V; j += kStep) top[0] = maximum<float>(load_row(x + j), top[0]);
  if (const int rest = static_cast<int>(V - j); rest > 0) {
    top[1] = maximum<float>(keep_first(load_row_first(x + j, rest), rest, minus_infinity), top[1]);
  }
  const Vec<float> tops = maximum<float>(maximum<float>(top[0], top[1]), maximum<float>(top[2], top[3]));
  const float m = capped(maximum_of<float>(tops), softcap);

  const Shift<kCap> shift{broadcast(m), broadcast(softcap), broadcast(kCap ? 1 / softcap : 0.0f)};
  const Vec<float> zero = broadcast(0.0f);
  Vec<float> sum[kChains] = {zero, zero, zero, zero}, shifted[kChains] = {zero, zero, zero, zero};
  for (j = 0; j + kChains * kStep <= V; j += kChains * kStep) {
    for (int k = 0; k < kChains; ++k) {
      const Vec<float> d = shift(load_row(x + j + k * kStep));
      sum[k] += exp_negative(d);
      if (with_shifted) shifted[k] += d;
    }
  }
  for (; j + kStep <= V; j += kStep) {
    const Vec<float> d = shift(load_row(x + j));
    sum[0] += exp_negative(d);
    if (with_shifted) shifted[0] += d;
  }
  if (const int rest = static_cast<int>(V - j); rest > 0) {
    const Vec<float> d = shift(load_row_first(x + j, rest));
    sum[1] += keep_first(exp_negative(d), rest, zero);
    if (with_shifted) shifted[1] += keep_first(d, rest, zero);
  }
  return {m, tree_sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])),
          tree_sum_of((shifted[0] + shifted[1]) + (shifted[2] + shifted[3]))};
}

template <class T>
RowSums<float> scan(const T* x, int64_t V, float softcap, bool with_shifted) {
  return softcap > 0 ? scan_row<true>(x, V, softcap, with_shifted) : scan_row<false>(x, V, softcap, with_shifted);
}

template <bool kCap>
struct GradientOf {
  Vec<float> m, softmax, everywhere, c, inverse;
  CHARGPT_INLINE Vec<float> operator()(Vec<float> x) const {
    if (!kCap) return fused(exp_negative(x - m), softmax, everywhere);
    const Vec<float> ratio = tanh_of(rounded(x * inverse));
    const Vec<float> g = fused(exp_negative(rounded(c * ratio) - m), softmax, everywhere);
    return g * (1.0f - ratio * ratio);
  }
};

template <bool kCap, class T>
void gradient_row(const T* x, T* out, int64_t V, float maximum, const GradientTerms<float>& terms, float softcap,
                  bool stream_out, const T* next_row) {
  constexpr int kStep = kLanes<float>;
  const GradientOf<kCap> gradient_of{broadcast(maximum), broadcast(terms.softmax), broadcast(terms.everywhere),
                                     broadcast(softcap), broadcast(kCap ? 1 / softcap : 0.0f)};
  int64_t j = 0;
  if (stream_out) {
    constexpr int64_t kLine = 64;
    const int64_t before = static_cast<int64_t>((-reinterpret_cast<uintptr_t>(out) % kLine) / sizeof(T));
    for (const int64_t head = std::min(before, V); j < head;) {
      const int n = static_cast<int>(std::min<int64_t>(kStep - 1, head - j));
      store_row_first(out + j, gradient_of(load_row_first(x + j, n)), n);
      j += n;
    }
    for (; j + 4 * kStep <= V; j += 4 * kStep) {
      for (int k = 0; k < 4; k += 2) {
        const T* two = x + j + k * kStep;
        if (next_row != nullptr) {
          __builtin_prefetch(next_row + j + k * kStep, 0, 2);
          if (sizeof(T) == 4) __builtin_prefetch(next_row + j + (k + 1) * kStep, 0, 2);
        }
        stream_row(out + j + k * kStep, gradient_of(load_row(two)), gradient_of(load_row(two + kStep)));
      }
    }
  }
  for (; j + kStep <= V; j += kStep) store_row(out + j, gradient_of(load_row(x + j)));
  if (const int rest = static_cast<int>(V - j); rest > 0) {
    store_row_first(out + j, gradient_of(load_row_first(x + j, rest)), rest);
  }
  if (stream_out) fence();
}

template <class T>
void gradient(const T* x, T* out, int64_t V, float maximum, const GradientTerms<float>& terms, float softcap,
              bool stream_out, const T* next_row) {
  if (softcap > 0) {
    gradient_row<true>(x, out, V, maximum, terms, softcap, stream_out, next_row);
  } else {
    gradient_row<false>(x, out, V, maximum, terms, softcap, stream_out, next_row);
  }
}

struct Larger {
  CHARGPT_INLINE Vec<float> operator()(Vec<float> a, Vec<float> b) const { return maximum<float>(a, b); }
};
struct Sum {
  CHARGPT_INLINE Vec<float> operator()(Vec<float> a, Vec<float> b) const { return a + b; }
};

template <class T>
void short_rows(const CrossEntropy<T>& problem, float scale, float* losses, int64_t begin, int64_t end) {
  constexpr int kStep = kLanes<float>;
  alignas(64) float exponentials[kStep][kShortRow];
  alignas(64) float maxima[kStep], sums[kStep], log_sums[kStep], shifted[kStep];
  const auto& options = problem.options;
  const bool smooth = options.label_smoothing > 0;
  const int V = static_cast<int>(problem.V), whole = V / kStep * kStep, rest = V - whole;
  const Vec<float> zero = broadcast(0.0f), minus_infinity = broadcast(-std::numeric_limits<float>::infinity());

  for (int64_t i = begin; i < end; i += kStep) {
    const int rows = static_cast<int>(std::min<int64_t>(kStep, end - i));
    const T* block = problem.logits + i * problem.row_stride;
    Vec<float> partial[kStep];
    for (int r = 0; r < kStep; ++r) {
      const T* x = block + std::min(r, rows - 1) * problem.row_stride;  // a short block repeats its last row
      Vec<float> top = rest > 0 ? keep_first(load_row_first(x + whole, rest), rest, minus_infinity) : minus_infinity;
      for (int j = 0; j < whole; j += kStep) top = maximum<float>(load_row(x + j), top);
      partial[r] = top;
    }
    store<float>(maxima, combine_lanes(partial, Larger()));

    Vec<float> partial_shifted[kStep];
    for (int r = 0; r < kStep; ++r) {
      const T* x = block + std::min(r, rows - 1) * problem.row_stride;
      const Vec<float> row_maximum = broadcast(maxima[r]);
      Vec<float> sum = zero, shift = zero;
      for (int j = 0; j < whole; j += kStep) {
        const Vec<float> d = load_row(x + j) - row_maximum, e = exp_negative(d);
        store<float>(exponentials[r] + j, e);
        sum += e;
        if (smooth) shift += d;
      }
      if (rest > 0) {
        const Vec<float> d = keep_first(load_row_first(x + whole, rest) - row_maximum, rest, minus_infinity);
        const Vec<float> e = exp_negative(d);
        store<float>(exponentials[r] + whole, e);
        sum += keep_first(e, rest, zero);
        if (smooth) shift += keep_first(d, rest, zero);
      }
      partial[r] = sum;
      partial_shifted[r] = shift;
    }
    const Vec<float> s = combine_lanes(partial, Sum());
    store<float>(sums, s);
    store<float>(log_sums, log_positive(s));
    store<float>(shifted, smooth ? combine_lanes(partial_shifted, Sum()) : zero);

    for (int r = 0; r < rows; ++r) {
      const int64_t target = problem.targets[i + r];
      const bool ignored = target == options.ignore_index;
      problem.maxima[i + r] = maxima[r];
      problem.sums[i + r] = sums[r];
      losses[i + r] = 0;
      if (!ignored) {
        const float target_logit = widened(block[r * problem.row_stride + target]);
        losses[i + r] = row_loss<float>({maxima[r], sums[r], shifted[r]}, log_sums[r], target_logit, V, options);
      }
      if (problem.gradient == nullptr) continue;
      T* out = problem.gradient + (i + r) * V;
      if (ignored) {
        std::memset(out, 0, static_cast<size_t>(V) * sizeof *out);
        continue;
      }
      const float lse = maxima[r] + log_sums[r];
      const auto terms = gradient_terms(sums[r], lse, scale, V, options);
      const Vec<float> softmax = broadcast(terms.softmax), everywhere = broadcast(terms.everywhere);
      const float* e = exponentials[r];
      for (int j = 0; j < whole; j += kStep) store_row(out + j, fused(load<float>(e + j), softmax, everywhere));
      if (rest > 0) store_row_first(out + whole, fused(load<float>(e + whole), softmax, everywhere), rest);
      out[target] = narrowed<T>(target_gradient(e[target], sums[r], lse, scale, V, options));
    }
  }
}

template <class T>
constexpr RowFunctions<T> kRowFunctions{&scan<T>, &capped, &gradient<T>, &short_rows<T>};

}  // namespace

const RowFunctions<float>& row_functions_float() { return kRowFunctions<float>; }
const RowFunctions<BFloat16>& row_functions_half() { return kRowFunctions<BFloat16>; }

}  // namespace chargpt::cpu::CHARGPT_ISA

#endif  // CHARGPT_ISA_LEVEL >= 1
