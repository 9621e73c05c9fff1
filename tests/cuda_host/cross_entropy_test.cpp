// Cross-entropy on the CPU: entry points for test_cross_entropy_on_host.py, and a main() for the sanitizers, where every
// buffer ends where its tensor ends and results are compared with float64 loops.

#include "cross_entropy.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

using namespace chargpt;
using namespace chargpt::cuda;

namespace {

// Device memory: at a multiple of 256 bytes as cudaMalloc gives it, `offset` further on where one asks.
template <class T>
struct Buffer {
  size_t bytes, offset;
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, std::free};

  explicit Buffer(size_t count, size_t offset = 0) : bytes(count * sizeof(T) + offset), offset(offset) {
    void* data = nullptr;
    if (posix_memalign(&data, 256, std::max<size_t>(bytes, 1)) != 0) std::abort();
    memory.reset(static_cast<char*>(data));
    std::memset(data, 0xff, bytes);
  }
  T* data() { return reinterpret_cast<T*>(memory.get() + offset); }
  T& operator[](size_t i) { return data()[i]; }
};

float widened(float x) { return x; }
float widened(__half x) { return __half2float(x); }
float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
void narrowed(float x, float* out) { *out = x; }
void narrowed(float x, __half* out) { *out = __float2half_rn(x); }
void narrowed(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

}  // namespace

extern "C" {

void set_chip(int multiprocessors, int shared_bytes) {
  host_multiprocessors = multiprocessors;
  host_shared_bytes = shared_bytes;
}

int launches() { return host_launches; }  // so far

int64_t workspace_bytes(const CrossEntropy* problem) { return static_cast<int64_t>(cross_entropy_workspace(*problem)); }

int forward(const CrossEntropy* problem, float* loss, float* normalisers, void* gradient) {
  Buffer<char> workspace(cross_entropy_workspace(*problem));
  return cross_entropy_forward(*problem, loss, normalisers, gradient, workspace.data(), nullptr);
}

int backward(const CrossEntropy* problem, const float* loss_gradient, const float* normalisers, void* gradient) {
  Buffer<char> workspace(cross_entropy_workspace(*problem));
  return cross_entropy_backward(*problem, loss_gradient, normalisers, gradient, workspace.data(), nullptr);
}

int scale_gradient(int dtype, void* gradient, int64_t count, const float* factor) {
  return cross_entropy_scale_gradient(static_cast<DType>(dtype), gradient, count, factor, nullptr);
}

}  // extern "C"

// ---- For the sanitizers --------------------------------------------------------------------------------------------

namespace {

int failures = 0;

struct Case {
  int N, V;
  int gap = 0;        // elements between rows
  size_t offset = 0;  // bytes by which the logits, and twice that by which the gradient, miss a multiple of 256
  CrossEntropyOptions options = {};
  Reduction reduction = Reduction::kMean;
};

void expect(double got, double wanted, double tolerance, const char* what, const Case& c) {
  if (std::abs(got - wanted) <= tolerance * std::max(1.0, std::abs(wanted))) return;
  if (++failures <= 10) std::printf("%s at N=%d V=%d: got %.9g, wanted %.9g\n", what, c.N, c.V, got, wanted);
}

// Loss and gradient of one row of logits.
double row_loss(std::vector<double> x, int64_t target, const CrossEntropyOptions& o, double scale,
                std::vector<double>& gradient) {
  const double V = static_cast<double>(x.size());
  std::vector<double> factor(x.size(), 1.0);
  double top = -INFINITY, sum = 0, total = 0;
  for (size_t j = 0; j < x.size(); ++j) {
    if (o.softcap > 0) {
      const double t = std::tanh(x[j] / o.softcap);
      x[j] = o.softcap * t;
      factor[j] = 1 - t * t;
    }
    top = std::max(top, x[j]);
    total += x[j];
  }
  for (double value : x) sum += std::exp(value - top);
  const double lse = top + std::log(sum), e = o.label_smoothing;
  for (size_t j = 0; j < x.size(); ++j) {
    const double wanted = (static_cast<int64_t>(j) == target ? 1 - e : 0) + e / V;
    gradient[j] = scale * factor[j] * ((1 + 2 * o.z_loss * lse) * std::exp(x[j] - lse) - wanted);
  }
  return (1 - e) * (lse - x[target]) + e * (lse - total / V) + o.z_loss * lse * lse;
}

template <class T>
void check(const Case& c, DType dtype) {
  std::mt19937 random(static_cast<unsigned>(c.V));
  std::normal_distribution<float> normal(0, 3);
  const int64_t stride = c.V + c.gap;
  const size_t N = static_cast<size_t>(c.N), V = static_cast<size_t>(c.V), elements = N * V;
  Buffer<T> logits(N > 0 ? (N - 1) * stride + V : 0, c.offset);
  Buffer<T> gradient(elements, 2 * c.offset), later(elements, 2 * c.offset);
  Buffer<int64_t> targets(N);
  Buffer<float> loss(c.reduction == Reduction::kNone ? N : 1), without(c.reduction == Reduction::kNone ? N : 1);
  Buffer<float> normalisers(2 * N), upstream(c.reduction == Reduction::kNone ? N : 1);
  for (size_t i = 0; i < N; ++i) {
    for (size_t j = 0; j < V; ++j) narrowed(normal(random), &logits[i * stride + j]);
    targets[i] = i % 4 == 3 ? c.options.ignore_index : static_cast<int64_t>(random() % V);
  }
  for (size_t i = 0; i < upstream.bytes / sizeof(float); ++i) upstream[i] = 1;
  const CrossEntropy problem{dtype, logits.data(), c.N, c.V, stride, targets.data(), c.options, c.reduction};
  if (forward(&problem, loss.data(), normalisers.data(), gradient.data()) != 0 ||
      backward(&problem, upstream.data(), normalisers.data(), later.data()) != 0 ||
      forward(&problem, without.data(), normalisers.data(), nullptr) != 0) {
    std::printf("a launch failed at N=%d V=%d\n", c.N, c.V);
    ++failures;
    return;
  }
  const double tolerance = dtype == DType::kFloat32 ? 3e-6 : dtype == DType::kFloat16 ? 1e-3 : 5e-3;
  const size_t valid = N - N / 4;
  const double scale = c.reduction == Reduction::kMean ? 1.0 / static_cast<double>(std::max<size_t>(valid, 1)) : 1.0;
  double sum = 0;
  for (size_t i = 0; i < N; ++i) {
    std::vector<double> x(V), wanted(V);
    for (size_t j = 0; j < V; ++j) x[j] = widened(logits[i * stride + j]);
    const double row = targets[i] == c.options.ignore_index ? 0 : row_loss(x, targets[i], c.options, scale, wanted);
    sum += scale * row;
    for (size_t j = 0; j < V; ++j) {
      expect(widened(gradient[i * V + j]), wanted[j], tolerance, "gradient", c);
      expect(widened(later[i * V + j]), wanted[j], tolerance, "gradient of the backward", c);
    }
    if (c.reduction == Reduction::kNone) {
      expect(loss[i], row, 1e-5, "loss", c);
      expect(without[i], row, 1e-5, "loss without gradient", c);
    }
  }
  if (c.reduction != Reduction::kNone) {
    expect(loss[0], sum, 1e-5, "loss", c);
    expect(without[0], sum, 1e-5, "loss without gradient", c);
  }
  float two = 2;
  if (scale_gradient(static_cast<int>(dtype), later.data(), static_cast<int64_t>(elements), &two) != 0) ++failures;
  for (size_t i = 0; i < elements; ++i) expect(widened(later[i]), 2 * widened(gradient[i]), 2 * tolerance, "scaled", c);
}

template <class T>
constexpr int kWide = 16 / sizeof(T);  // elements of a chunk
constexpr CrossEntropyOptions kEverything{.ignore_index = -1, .label_smoothing = 0.1, .z_loss = 0.01, .softcap = 5};

template <class T>
void check_short_rows(DType dtype) {
  constexpr int K = kWide<T>;
  const std::vector<Case> cases = {
      {0, 5}, {2, 1}, {35, 7}, {33, 65, 3}, {5, 65, 0, sizeof(T), kEverything}, {3, 16 * K + 1},
      {9, 17 * K + 5, 0, 0, {}, Reduction::kNone}, {9, 65 * K, 2, 0, {}, Reduction::kSum},
  };
  for (const Case& c : cases) check<T>(c, dtype);
}

// One block that goes through all rows, some blocks, and rows that shared memory has room for a part of, and for none.
template <class T>
void check_long_rows(DType dtype, std::vector<int> shared_bytes, Reduction reduction = Reduction::kMean) {
  for (int bytes : shared_bytes) {
    set_chip(1, bytes);
    check<T>({5, 257 * kWide<T> + 3, 1, sizeof(T), kEverything, reduction}, dtype);
  }
  set_chip(2, 232448);
}

}  // namespace

// Sums over the rows that one block does, that several do, the last of them for one row or for all but one.
[[maybe_unused]] void check_many_rows() {
  constexpr int kSpan = 16384;
  check<__half>({kSpan, 1, 0, 0, kEverything}, DType::kFloat16);
  check<__half>({kSpan + 1, 1, 0, 0, kEverything}, DType::kFloat16);
  check<__half>({2 * kSpan - 1, 1, 0, 0, kEverything, Reduction::kSum}, DType::kFloat16);
}

int main() {
  check_long_rows<__nv_bfloat16>(DType::kBFloat16, {6000, 16000, 3968, 2000});
  check_long_rows<__nv_bfloat16>(DType::kBFloat16, {6000, 2000}, Reduction::kNone);
  check_long_rows<float>(DType::kFloat32, {6000, 16000, 3968, 2000});
  check_short_rows<float>(DType::kFloat32);
  check_short_rows<__half>(DType::kFloat16);
  check_short_rows<__nv_bfloat16>(DType::kBFloat16);
#ifndef __SANITIZE_THREAD__  // which keeps count of no more than 8128 threads; these cases have more than a hundred thousand
  check_many_rows();
#endif
  std::printf("cross-entropy: %d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
