// Softmax cross-entropy, loss and gradient, one row at a time while the row is in cache.
//
// For a row x of V logits with target y, smoothing e, z-loss weight z and a factor s on its loss:
//   m = max x,  S = sum exp(x - m),  lse = m + log S
//   loss       = (1 - e) (lse - x_y) + e (lse - mean x) + z lse^2
//   gradient_j = s [(1 + 2 z lse) exp(x_j - m) / S - e / V - (1 - e) (j == y)]
// With softcap c the x above are c tanh(logit / c), and gradient_j gains the factor 1 - (x_j / c)^2.
// The pair (m, S) is kept for the backward and not lse: x - lse would lose all digits that lse has no room for.
//
// Long rows (V = 50257: 201 KB of float32) make three sweeps, and only the first one meets memory: the row stays in
// the L2 cache for the sum and for the gradient, which is written around the caches when it is larger than they are.
// Short rows (V = 65) would spend their time on horizontal sums and logarithms, so as many rows as a vector has lanes
// go together: their maxima and sums are reduced by one transposition, and the exponentials stay in L1 as float32.
//
// Everything is written once, in cross_entropy_rows.inc, over a dozen vector operations that each instruction set
// defines below. Functions carry their target as an attribute, so one object file serves all CPUs.

#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "isa.h"

#define CHARGPT_INLINE inline __attribute__((always_inline))

namespace chargpt::cpu {
namespace {

constexpr int64_t kShortRow = 128;  // 16 such rows of float32 take 8 KiB, a quarter of the smallest L1

// What one sweep over a row finds.
template <class Real>
struct RowSums {
  Real maximum;  // m
  Real sum;      // sum of exp(x - m)
  Real shifted;  // sum of x - m, for label smoothing
};

// The gradient at every logit of a row but the target's: (exp(x_j - m) * softmax + everywhere) * softcap's factor.
template <class Real>
struct GradientTerms {
  Real softmax, everywhere;
};

template <class T>
CHARGPT_INLINE ComputeType<T> widen(T x) {
  return x;
}
template <>
CHARGPT_INLINE float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
CHARGPT_INLINE T narrow(ComputeType<T> x) {
  return x;
}
template <>
CHARGPT_INLINE BFloat16 narrow<BFloat16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The loss of one row. log_sum: log(row.sum).
template <class Real>
CHARGPT_INLINE Real row_loss(const RowSums<Real>& row, Real log_sum, Real target_logit, int64_t V,
                             const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing);
  Real loss = (1 - smoothing) * (log_sum + (row.maximum - target_logit));
  if (smoothing > 0) loss += smoothing * (log_sum - row.shifted / static_cast<Real>(V));
  const Real lse = row.maximum + log_sum;
  if (options.z_loss > 0) loss += static_cast<Real>(options.z_loss) * lse * lse;
  return loss;
}

template <class Real>
CHARGPT_INLINE GradientTerms<Real> gradient_terms(Real sum, Real lse, Real scale, int64_t V,
                                                  const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing);
  return {scale * (1 + 2 * static_cast<Real>(options.z_loss) * lse) / sum, -scale * smoothing / static_cast<Real>(V)};
}

// The gradient at the target, before softcap's factor. What nearly cancels, p - 1, is subtracted first.
template <class Real>
CHARGPT_INLINE Real target_gradient(Real exponential, Real sum, Real lse, Real scale, int64_t V,
                                    const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing), p = exponential / sum;
  const Real wanted = (1 - smoothing) + smoothing / static_cast<Real>(V);
  return scale * ((p - wanted) + 2 * static_cast<Real>(options.z_loss) * lse * p);
}

// What softcap does to a gradient: 1 - tanh^2.
template <class Real>
CHARGPT_INLINE Real softcap_factor(Real x, Real softcap) {
  return softcap > 0 ? 1 - (x / softcap) * (x / softcap) : 1;
}

// What an instruction set provides for logits of type T.
template <class T>
struct RowFunctions {
  using Real = ComputeType<T>;
  const char* name;
  // `shifted` is filled only where with_shifted is true.
  RowSums<Real> (*scan)(const T* x, int64_t V, Real softcap, bool with_shifted);
  // One logit after the softcap, bit for bit as the other functions see it.
  Real (*capped)(Real x, Real softcap);
  // Writes the gradient, at the target as elsewhere. Reads next_row (nullptr: none) ahead into the cache.
  void (*gradient)(const T* x, T* out, int64_t V, Real maximum, const GradientTerms<Real>& terms, Real softcap,
                   bool stream, const T* next_row);
  // cross_entropy_forward for V <= kShortRow without softcap; nullptr: not special.
  void (*short_rows)(const CrossEntropy<T>& problem, Real scale, Real* losses, int64_t begin, int64_t end);
};

namespace plain {

template <class Real>
Real capped(Real x, Real softcap) {
  return softcap > 0 ? softcap * static_cast<Real>(std::tanh(static_cast<double>(x) / softcap)) : x;
}

template <class T>
RowSums<ComputeType<T>> scan(const T* x, int64_t V, ComputeType<T> softcap, bool) {
  using Real = ComputeType<T>;
  Real maximum = -std::numeric_limits<Real>::infinity();
  for (int64_t j = 0; j < V; ++j) maximum = std::max(maximum, widen(x[j]));
  maximum = capped(maximum, softcap);
  double sum = 0, shifted = 0;
  for (int64_t j = 0; j < V; ++j) {
    const Real d = capped(widen(x[j]), softcap) - maximum;
    sum += std::exp(d);
    shifted += d;
  }
  return {maximum, static_cast<Real>(sum), static_cast<Real>(shifted)};
}

template <class T>
void gradient(const T* x, T* out, int64_t V, ComputeType<T> maximum, const GradientTerms<ComputeType<T>>& terms,
              ComputeType<T> softcap, bool, const T*) {
  for (int64_t j = 0; j < V; ++j) {
    const auto value = capped(widen(x[j]), softcap);
    out[j] = narrow<T>((std::exp(value - maximum) * terms.softmax + terms.everywhere) * softcap_factor(value, softcap));
  }
}

template <class T>
constexpr RowFunctions<T> functions{"plain", &scan<T>, &capped<ComputeType<T>>, &gradient<T>, nullptr};

}  // namespace plain

#if defined(__x86_64__)

namespace avx512_bf16 {
#define CHARGPT_NAME "avx512_bf16"
#define CHARGPT_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
#define CHARGPT_HAS_BF16 1
#include "cross_entropy_avx512.inc"
#include "cross_entropy_rows.inc"
#undef CHARGPT_HAS_BF16
#undef CHARGPT_TARGET
#undef CHARGPT_NAME
}  // namespace avx512_bf16

namespace avx512 {
#define CHARGPT_NAME "avx512"
#define CHARGPT_TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define CHARGPT_HAS_BF16 0
#include "cross_entropy_avx512.inc"
#include "cross_entropy_rows.inc"
#undef CHARGPT_HAS_BF16
#undef CHARGPT_TARGET
#undef CHARGPT_NAME
}  // namespace avx512

namespace avx2 {
#define CHARGPT_TARGET __attribute__((target("avx2,fma")))

using Vec = __m256;
constexpr int kLanes = 8;

CHARGPT_TARGET CHARGPT_INLINE Vec first(int n) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lanes));
}
CHARGPT_TARGET CHARGPT_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
CHARGPT_TARGET CHARGPT_INLINE Vec load(const BFloat16* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
CHARGPT_TARGET CHARGPT_INLINE Vec load_first(const float* p, int n) {
  return _mm256_maskload_ps(p, _mm256_castps_si256(first(n)));
}
CHARGPT_TARGET CHARGPT_INLINE Vec load_first(const BFloat16* p, int n) {
  BFloat16 copy[kLanes] = {};
  std::memcpy(copy, p, static_cast<size_t>(n) * sizeof *p);
  return load(copy);
}
CHARGPT_TARGET CHARGPT_INLINE __m128i to_bf16(Vec x) {  // as for AVX-512
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i halves = _mm256_srli_epi32(rounded, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}
CHARGPT_TARGET CHARGPT_INLINE void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
CHARGPT_TARGET CHARGPT_INLINE void store(BFloat16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16(x));
}
CHARGPT_TARGET CHARGPT_INLINE void store_first(float* p, Vec x, int n) {
  _mm256_maskstore_ps(p, _mm256_castps_si256(first(n)), x);
}
CHARGPT_TARGET CHARGPT_INLINE void store_first(BFloat16* p, Vec x, int n) {
  BFloat16 copy[kLanes];
  store(copy, x);
  std::memcpy(p, copy, static_cast<size_t>(n) * sizeof *p);
}
CHARGPT_TARGET CHARGPT_INLINE void stream(float* p, Vec a, Vec b) {  // p aligned to a cache line
  _mm256_stream_ps(p, a);
  _mm256_stream_ps(p + kLanes, b);
}
CHARGPT_TARGET CHARGPT_INLINE void stream(BFloat16* p, Vec a, Vec b) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_set_m128i(to_bf16(b), to_bf16(a)));
}
CHARGPT_TARGET CHARGPT_INLINE Vec set(float x) { return _mm256_set1_ps(x); }
CHARGPT_TARGET CHARGPT_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
CHARGPT_TARGET CHARGPT_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
CHARGPT_TARGET CHARGPT_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
CHARGPT_TARGET CHARGPT_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
CHARGPT_TARGET CHARGPT_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
CHARGPT_TARGET CHARGPT_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }  // a b + c
CHARGPT_TARGET CHARGPT_INLINE Vec keep_first(Vec x, int n, Vec others) { return _mm256_blendv_ps(others, x, first(n)); }
CHARGPT_TARGET CHARGPT_INLINE Vec magnitude(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
CHARGPT_TARGET CHARGPT_INLINE Vec with_sign(Vec x, Vec sign) {  // x >= 0
  return _mm256_or_ps(x, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
CHARGPT_TARGET CHARGPT_INLINE Vec select_below(Vec x, Vec bound, Vec below, Vec otherwise) {  // x < bound ? …
  return _mm256_blendv_ps(otherwise, below, _mm256_cmp_ps(x, bound, _CMP_LT_OQ));
}
CHARGPT_TARGET CHARGPT_INLINE Vec fraction(Vec t) {
  t = max(set(-1000.0f), t);  // -inf - -inf would be NaN. The order of the arguments lets a NaN pass
  return sub(t, _mm256_round_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// p 2^(t - f). Powers below 2^-126, which are no normal numbers, become 0.
CHARGPT_TARGET CHARGPT_INLINE Vec scale_by_power(Vec p, Vec t, Vec f) {
  const Vec n = sub(max(set(-1000.0f), t), f);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const Vec scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
  // p >= 1/2, so n >= -125 keeps it normal. A NaN stays: its p is NaN.
  const Vec result = select_below(n, set(-125.0f), set(0.0f), scaled);
  return _mm256_blendv_ps(result, p, _mm256_cmp_ps(p, p, _CMP_UNORD_Q));
}
// x = 2^exponent mantissa with mantissa in [0.75, 1.5), for x > 0 and normal.
CHARGPT_TARGET CHARGPT_INLINE void split(Vec x, Vec* exponent, Vec* mantissa) {
  const __m256i bits = _mm256_castps_si256(x), origin = _mm256_set1_epi32(0x3f400000);  // 0.75
  const __m256i power = _mm256_srai_epi32(_mm256_sub_epi32(bits, origin), 23);
  *exponent = _mm256_cvtepi32_ps(power);
  *mantissa = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(power, 23)));
}
CHARGPT_TARGET CHARGPT_INLINE float sum_lanes(Vec x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
CHARGPT_TARGET CHARGPT_INLINE float max_lanes(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
CHARGPT_TARGET CHARGPT_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
CHARGPT_TARGET CHARGPT_INLINE void fence() { _mm_sfence(); }

// As for AVX-512, with 8 rows and two 128-bit halves.
template <class Combine>
CHARGPT_TARGET CHARGPT_INLINE Vec combine_lanes(const Vec* rows, Combine combine) {
  Vec quads[2];
  for (int q = 0; q < 2; ++q) {
    const Vec* r = rows + 4 * q;
    const Vec ab = combine(_mm256_unpacklo_ps(r[0], r[1]), _mm256_unpackhi_ps(r[0], r[1]));
    const Vec cd = combine(_mm256_unpacklo_ps(r[2], r[3]), _mm256_unpackhi_ps(r[2], r[3]));
    const __m256d ab2 = _mm256_castps_pd(ab), cd2 = _mm256_castps_pd(cd);
    quads[q] = combine(_mm256_castpd_ps(_mm256_unpacklo_pd(ab2, cd2)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab2, cd2)));
  }
  return combine(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
}

#define CHARGPT_NAME "avx2"
#include "cross_entropy_rows.inc"
#undef CHARGPT_NAME
#undef CHARGPT_TARGET
}  // namespace avx2

#endif  // __x86_64__

template <class T>
const RowFunctions<T>& row_functions() {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<T, double>) {
    if (best_isa() == Isa::kAvx512Bf16) return avx512_bf16::functions<T>;
    if (best_isa() == Isa::kAvx512) return avx512::functions<T>;
    if (best_isa() == Isa::kAvx2) return avx2::functions<T>;
  }
#endif
  return plain::functions<T>;
}

// Writes the gradient of one row.
template <class T>
void write_gradient(const RowFunctions<T>& row, const CrossEntropy<T>& problem, ComputeType<T> scale, int64_t i,
                    int64_t end) {
  using Real = ComputeType<T>;
  const int64_t V = problem.V, target = problem.targets[i];
  const Real softcap = static_cast<Real>(problem.options.softcap), maximum = problem.maxima[i], sum = problem.sums[i];
  const T* x = problem.logits + i * problem.row_stride;
  T* out = problem.gradient + i * V;
  if (target == problem.options.ignore_index) {
    std::memset(out, 0, static_cast<size_t>(V) * sizeof *out);
    return;
  }
  const Real lse = maximum + std::log(sum);
  const auto terms = gradient_terms(sum, lse, scale, V, problem.options);
  row.gradient(x, out, V, maximum, terms, softcap, problem.stream, i + 1 < end ? x + problem.row_stride : nullptr);
  const Real value = row.capped(widen(x[target]), softcap);
  const Real g = target_gradient(std::exp(value - maximum), sum, lse, scale, V, problem.options);
  out[target] = narrow<T>(g * softcap_factor(value, softcap));
}

}  // namespace

template <class T>
void cross_entropy_forward(const CrossEntropy<T>& problem, ComputeType<T> scale, ComputeType<T>* losses, int64_t begin,
                           int64_t end) {
  using Real = ComputeType<T>;
  const auto& row = row_functions<T>();
  const auto& options = problem.options;
  if (row.short_rows != nullptr && problem.V <= kShortRow && options.softcap == 0) {
    row.short_rows(problem, scale, losses, begin, end);
    return;
  }
  const Real softcap = static_cast<Real>(options.softcap);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = problem.logits + i * problem.row_stride;
    losses[i] = 0;
    if (problem.targets[i] != options.ignore_index) {
      const RowSums<Real> sums = row.scan(x, problem.V, softcap, options.label_smoothing > 0);
      problem.maxima[i] = sums.maximum;
      problem.sums[i] = sums.sum;
      const Real target_logit = row.capped(widen(x[problem.targets[i]]), softcap);
      losses[i] = row_loss(sums, std::log(sums.sum), target_logit, problem.V, options);
    }
    if (problem.gradient != nullptr) write_gradient(row, problem, scale, i, end);
  }
}

template <class T>
void cross_entropy_backward(const CrossEntropy<T>& problem, ComputeType<T> scale, const ComputeType<T>* weights,
                            int64_t begin, int64_t end) {
  const auto& row = row_functions<T>();
  for (int64_t i = begin; i < end; ++i) {
    write_gradient(row, problem, weights == nullptr ? scale : scale * weights[i], i, end);
  }
}

int64_t check_targets(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index) {
  int64_t valid = 0, wrong = 0;
  for (int64_t i = 0; i < N; ++i) {
    const bool counts = targets[i] != ignore_index;
    valid += counts;
    wrong += counts & (static_cast<uint64_t>(targets[i]) >= static_cast<uint64_t>(V));
  }
  return wrong == 0 ? valid : -1;
}

template <class Real>
double sum_losses(const Real* losses, int64_t N) {
  constexpr int kChains = 8;  // additions in flight
  double sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains <= N; i += kChains) {
    for (int k = 0; k < kChains; ++k) sums[k] += losses[i + k];
  }
  double total = 0;
  for (; i < N; ++i) total += losses[i];
  for (const double sum : sums) total += sum;
  return total;
}

const char* cross_entropy_isa() { return row_functions<float>().name; }

#define CHARGPT_INSTANTIATE(T)                                                                                  \
  template void cross_entropy_forward<T>(const CrossEntropy<T>&, ComputeType<T>, ComputeType<T>*, int64_t, int64_t); \
  template void cross_entropy_backward<T>(const CrossEntropy<T>&, ComputeType<T>, const ComputeType<T>*, int64_t,     \
                                          int64_t);
CHARGPT_INSTANTIATE(float)
CHARGPT_INSTANTIATE(double)
CHARGPT_INSTANTIATE(BFloat16)
#undef CHARGPT_INSTANTIATE
template double sum_losses<float>(const float*, int64_t);
template double sum_losses<double>(const double*, int64_t);

}  // namespace chargpt::cpu
