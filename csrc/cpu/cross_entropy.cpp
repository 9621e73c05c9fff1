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
// The vector code is written once, in cross_entropy_kernel.h, over simd/simd.h. What is here is scalar: the parts that
// every path shares, double, and CPUs without AVX2.

#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "simd/isa.h"

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
[[gnu::always_inline]] inline ComputeType<T> widened(T x) {
  return x;
}
template <>
[[gnu::always_inline]] inline float widened(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <class T>
[[gnu::always_inline]] inline T narrowed(ComputeType<T> x) {
  return x;
}
template <>
[[gnu::always_inline]] inline BFloat16 narrowed<BFloat16>(float x) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (std::isnan(x)) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The loss of one row. log_sum: log(row.sum).
template <class Real>
[[gnu::always_inline]] inline Real row_loss(const RowSums<Real>& row, Real log_sum, Real target_logit, int64_t V,
                             const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing);
  Real loss = (1 - smoothing) * (log_sum + (row.maximum - target_logit));
  if (smoothing > 0) loss += smoothing * (log_sum - row.shifted / static_cast<Real>(V));
  const Real lse = row.maximum + log_sum;
  if (options.z_loss > 0) loss += static_cast<Real>(options.z_loss) * lse * lse;
  return loss;
}

template <class Real>
[[gnu::always_inline]] inline GradientTerms<Real> gradient_terms(Real sum, Real lse, Real scale, int64_t V,
                                                  const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing);
  return {scale * (1 + 2 * static_cast<Real>(options.z_loss) * lse) / sum, -scale * smoothing / static_cast<Real>(V)};
}

// The gradient at the target, before softcap's factor. What nearly cancels, p - 1, is subtracted first.
template <class Real>
[[gnu::always_inline]] inline Real target_gradient(Real exponential, Real sum, Real lse, Real scale, int64_t V,
                                    const CrossEntropyOptions& options) {
  const Real smoothing = static_cast<Real>(options.label_smoothing), p = exponential / sum;
  const Real wanted = (1 - smoothing) + smoothing / static_cast<Real>(V);
  return scale * ((p - wanted) + 2 * static_cast<Real>(options.z_loss) * lse * p);
}

// What softcap does to a gradient: 1 - tanh^2.
template <class Real>
[[gnu::always_inline]] inline Real softcap_factor(Real x, Real softcap) {
  return softcap > 0 ? 1 - (x / softcap) * (x / softcap) : 1;
}

// What an instruction set provides for logits of type T.
template <class T>
struct RowFunctions {
  using Real = ComputeType<T>;
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

namespace scalar {

template <class Real>
Real capped(Real x, Real softcap) {
  return softcap > 0 ? softcap * static_cast<Real>(std::tanh(static_cast<double>(x) / softcap)) : x;
}

template <class T>
RowSums<ComputeType<T>> scan(const T* x, int64_t V, ComputeType<T> softcap, bool) {
  using Real = ComputeType<T>;
  Real maximum = -std::numeric_limits<Real>::infinity();
  for (int64_t j = 0; j < V; ++j) maximum = std::max(maximum, widened(x[j]));
  maximum = capped(maximum, softcap);
  double sum = 0, shifted = 0;
  for (int64_t j = 0; j < V; ++j) {
    const Real d = capped(widened(x[j]), softcap) - maximum;
    sum += std::exp(d);
    shifted += d;
  }
  return {maximum, static_cast<Real>(sum), static_cast<Real>(shifted)};
}

template <class T>
void gradient(const T* x, T* out, int64_t V, ComputeType<T> maximum, const GradientTerms<ComputeType<T>>& terms,
              ComputeType<T> softcap, bool, const T*) {
  for (int64_t j = 0; j < V; ++j) {
    const auto value = capped(widened(x[j]), softcap);
    out[j] = narrowed<T>((std::exp(value - maximum) * terms.softmax + terms.everywhere) * softcap_factor(value, softcap));
  }
}

template <class T>
constexpr RowFunctions<T> kRowFunctions{&scan<T>, &capped<ComputeType<T>>, &gradient<T>, nullptr};

}  // namespace scalar

}  // namespace
}  // namespace chargpt::cpu

#define CHARGPT_KERNEL "../cross_entropy_kernel.h"
#include "simd/foreach_isa.h"

namespace chargpt::cpu {
namespace {

template <class T>
const RowFunctions<T>& row_functions() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, float>) {
    if (best_isa() == Isa::kAvx512Bf16) return avx512_bf16::row_functions_float();
    if (best_isa() == Isa::kAvx512) return avx512::row_functions_float();
    if (best_isa() == Isa::kAvx2) return avx2::row_functions_float();
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    if (best_isa() == Isa::kAvx512Bf16) return avx512_bf16::row_functions_half();
    if (best_isa() == Isa::kAvx512) return avx512::row_functions_half();
    if (best_isa() == Isa::kAvx2) return avx2::row_functions_half();
  }
#endif
  return scalar::kRowFunctions<T>;
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
  const Real value = row.capped(widened(x[target]), softcap);  // before the gradient may take the logits' place
  row.gradient(x, out, V, maximum, terms, softcap, problem.stream, i + 1 < end ? x + problem.row_stride : nullptr);
  const Real g = target_gradient(std::exp(value - maximum), sum, lse, scale, V, problem.options);
  out[target] = narrowed<T>(g * softcap_factor(value, softcap));
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
      const Real target_logit = row.capped(widened(x[problem.targets[i]]), softcap);
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

const char* cross_entropy_isa() { return isa_name(best_isa()); }

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
