// Runs cross_entropy.cpp without torch, for the sanitizers: every buffer ends where its tensor ends, results are compared
// with float64 loops, and all ways to split the rows must give the same bits. `make sanitize` runs it on every code path.

#include "../cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

using namespace chargpt;
using namespace chargpt::cpu;

namespace {

int failures = 0;

float widen(float x) { return x; }
double widen(double x) { return x; }
float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
template <class T>
T narrow(double x) {
  return static_cast<T>(x);
}
template <>
BFloat16 narrow<BFloat16>(double x) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return {static_cast<uint16_t>(bits >> 16)};
}

template <class T>
constexpr double kTolerance = 3e-6;
template <>
constexpr double kTolerance<double> = 1e-12;
template <>
constexpr double kTolerance<BFloat16> = 4e-3;  // of the gradient; losses are float32

void expect(double got, double wanted, double tolerance, const char* what, int64_t V) {
  if (std::abs(got - wanted) <= tolerance * std::max(1.0, std::abs(wanted))) return;
  if (++failures <= 10) std::printf("%s at V=%ld: got %.9g, wanted %.9g\n", what, static_cast<long>(V), got, wanted);
}

// Loss and gradient of one row in float64.
template <class T>
double naive_row(const T* x, int64_t V, int64_t target, const CrossEntropyOptions& o, double scale, double* gradient) {
  std::vector<double> capped(V), factor(V, 1.0);
  for (int64_t j = 0; j < V; ++j) {
    capped[j] = widen(x[j]);
    if (o.softcap > 0) {
      const double t = std::tanh(capped[j] / o.softcap);
      capped[j] = o.softcap * t;
      factor[j] = 1 - t * t;
    }
  }
  const double top = *std::max_element(capped.begin(), capped.end());
  double sum = 0, mean = 0;
  for (const double value : capped) sum += std::exp(value - top), mean += value / static_cast<double>(V);
  const double lse = top + std::log(sum), e = o.label_smoothing;
  for (int64_t j = 0; j < V; ++j) {
    const double p = std::exp(capped[j] - top) / sum;
    const double hot = (j == target ? 1 - e : 0.0) + e / static_cast<double>(V);
    gradient[j] = scale * ((1 + 2 * o.z_loss * lse) * p - hot) * factor[j];
  }
  return (1 - e) * (lse - capped[target]) + (e > 0 ? e * (lse - mean) : 0.0) + o.z_loss * lse * lse;
}

template <class T>
void check(int64_t N, int64_t V, int64_t gap, bool stream, double spread, const CrossEntropyOptions& options) {
  using Real = ComputeType<T>;
  std::mt19937 random(static_cast<unsigned>(N * 1000003 + V));
  std::normal_distribution<double> normal(0.0, spread);
  const int64_t stride = V + gap;
  std::vector<T> logits(N == 0 ? 0 : (N - 1) * stride + V);
  std::vector<int64_t> targets(N);
  for (T& x : logits) x = narrow<T>(normal(random));
  for (int64_t i = 0; i < N; ++i) targets[i] = i % 5 == 4 ? options.ignore_index : static_cast<int64_t>(random() % V);
  std::vector<Real> maxima(N), sums(N), losses(N);
  std::vector<T> gradient(N * V);
  const Real scale = Real(0.25);
  CrossEntropy<T> problem{logits.data(), V,           stride,          targets.data(), options,
                          maxima.data(), sums.data(), gradient.data(), stream};
  cross_entropy_forward<T>(problem, scale, losses.data(), 0, N);

  std::vector<double> wanted(V);
  for (int64_t i = 0; i < N; ++i) {
    double loss = 0;
    std::fill(wanted.begin(), wanted.end(), 0.0);
    if (targets[i] != options.ignore_index) {
      loss = naive_row(logits.data() + i * stride, V, targets[i], options, scale, wanted.data());
    }
    expect(losses[i], loss, std::is_same_v<T, double> ? 1e-12 : 3e-6, "loss", V);
    for (int64_t j = 0; j < V; ++j) expect(widen(gradient[i * V + j]), wanted[j], kTolerance<T>, "gradient", V);
  }

  // The backward alone, then both again in pieces: not a bit may differ where the arithmetic is the same.
  std::vector<T> again(N * V);
  std::vector<Real> weights(N, scale), losses_again(N);
  problem.gradient = again.data();
  cross_entropy_backward<T>(problem, Real(1), weights.data(), 0, N);
  for (int64_t k = 0; k < N * V; ++k) expect(widen(again[k]), widen(gradient[k]), kTolerance<T>, "backward", V);
  for (int64_t i = 0; i < N; i += 3) {
    cross_entropy_forward<T>(problem, scale, losses_again.data(), i, std::min(i + 3, N));
  }
  if (N * V > 0 && std::memcmp(again.data(), gradient.data(), sizeof(T) * again.size()) != 0) {
    ++failures;
    std::printf("pieces differ at V=%ld\n", static_cast<long>(V));
  }
  if (gap == 0) {  // the gradient in the place of the logits
    std::vector<T> placed = logits;
    problem.logits = problem.gradient = placed.data();
    cross_entropy_forward<T>(problem, scale, losses_again.data(), 0, N);
    if (N * V > 0 && std::memcmp(placed.data(), gradient.data(), sizeof(T) * placed.size()) != 0) {
      ++failures;
      std::printf("the gradient in place differs at V=%ld\n", static_cast<long>(V));
    }
    problem.logits = logits.data();
  }
  problem.gradient = nullptr;
  cross_entropy_forward<T>(problem, scale, losses_again.data(), 0, N);
  if (N > 0 && std::memcmp(losses.data(), losses_again.data(), sizeof(Real) * N) != 0) {
    ++failures;
    std::printf("losses without gradient differ at V=%ld\n", static_cast<long>(V));
  }
}

template <class T>
void check_all() {
  const CrossEntropyOptions plain;
  CrossEntropyOptions all;
  all.label_smoothing = 0.1;
  all.z_loss = 0.01;
  all.softcap = 5.0;
  CrossEntropyOptions smooth = all;
  smooth.softcap = 0.0;
  smooth.ignore_index = 0;  // a target that is in range
  for (const int64_t V : {1, 2, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 257, 1000, 50257}) {
    for (const int64_t N : {0, 1, 3, 16, 17}) {
      if (V > 1000 && N > 3) continue;
      for (const bool stream : {false, true}) {
        for (const CrossEntropyOptions& options : {plain, all, smooth}) {
          check<T>(N, V, 0, stream, 3.0, options);
          check<T>(N, V, 5, stream, 1e4, options);
        }
      }
    }
  }
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
  check_all<BFloat16>();
  const int64_t targets[] = {0, 5, -100, 4};
  if (check_targets(targets, 4, 6, -100) != 3) ++failures;
  if (check_targets(targets, 4, 5, -100) != -1 || check_targets(targets, 4, 6, 1) != -1) ++failures;
  std::printf("cross-entropy on %s: %d failures\n", cross_entropy_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
