// Runs block.cpp without torch, for the sanitizers: every buffer ends where its tensor ends, results are compared with
// float64 loops, and all ways to split the rows must give the same bits. `make sanitize` runs it on every code path.

#include "../cpu/block.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

using namespace chargpt;
using namespace chargpt::cpu;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

struct Half {  // bfloat16
  uint16_t bits;
};

double widen(float x) { return x; }
double widen(double x) { return x; }
double widen(Half x) {
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
Half narrow<Half>(double x) {
  const float single = static_cast<float>(x);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

template <class T>
constexpr DType kType = std::is_same_v<T, float>    ? DType::kFloat32
                        : std::is_same_v<T, double> ? DType::kFloat64
                                                    : DType::kBFloat16;
template <class T>
constexpr double kTolerance = std::is_same_v<T, float> ? 1e-5 : std::is_same_v<T, double> ? 1e-12 : 1e-2;
template <class T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T>
std::vector<T> draw(int64_t n) {
  std::normal_distribution<double> normal;
  std::vector<T> values(n);
  for (T& x : values) x = narrow<T>(normal(random_bits));
  return values;
}

void expect(double got, double wanted, double tolerance, const char* what, int64_t size) {
  if (std::abs(got - wanted) <= tolerance * std::fmax(1.0, std::abs(wanted))) return;
  if (++failures <= 10) std::printf("%s at %ld: got %.9g, wanted %.9g\n", what, static_cast<long>(size), got, wanted);
}

template <class T>
void expect_same(const std::vector<T>& a, const std::vector<T>& b, const char* what, int64_t size) {
  if (a.empty() || std::memcmp(a.data(), b.data(), sizeof(T) * a.size()) == 0) return;
  if (++failures <= 10) std::printf("%s at %ld: pieces differ\n", what, static_cast<long>(size));
}

template <class X, class Y, class N>
void check_norm(int64_t rows, int64_t C, bool branch) {
  const auto x = draw<X>(rows * C), dsum = draw<X>(rows * C);
  const auto y = draw<Y>(rows * C);
  const auto dnormed = draw<N>(rows * C);
  std::vector<X> sum(rows * C), dx(rows * C), dx_again(rows * C);
  std::vector<N> normed(rows * C), normed_again(rows * C);
  std::vector<Y> dy(rows * C);
  std::vector<Real<X>> rstd(rows);
  AddRmsNorm call{kType<X>, kType<Y>, kType<N>, C, {x.data(), C}, {branch ? y.data() : nullptr, C}, sum.data(),
                  normed.data(), rstd.data()};
  add_rms_norm(call, 0, rows);
  const auto& s = branch ? sum : x;
  AddRmsNormBackward back{kType<X>,           kType<Y>,            kType<N>,  C,        {s.data(), C}, rstd.data(),
                          {dsum.data(), C}, {dnormed.data(), C}, dx.data(), dy.data()};
  add_rms_norm_backward(back, 0, rows);
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0, dot = 0;
    for (int64_t j = i * C; j < (i + 1) * C; ++j) {
      if (branch) expect(widen(sum[j]), widen(x[j]) + widen(y[j]), kTolerance<X>, "sum", C);
      squares += widen(s[j]) * widen(s[j]), dot += widen(s[j]) * widen(dnormed[j]);
    }
    const double r = 1 / std::sqrt(squares / static_cast<double>(C) + kRmsEps);
    for (int64_t j = i * C; j < (i + 1) * C; ++j) {
      expect(widen(normed[j]), widen(s[j]) * r, kTolerance<N>, "norm", C);
      const double d = widen(dsum[j]) + r * widen(dnormed[j]) - widen(s[j]) * r * r * r * dot / static_cast<double>(C);
      expect(widen(dx[j]), d, kTolerance<X>, "dx", C);
      expect(widen(dy[j]), d, kTolerance<Y>, "dy", C);
    }
  }
  call.normed = normed_again.data(), back.dx = dx_again.data();
  for (int64_t i = 0; i < rows; ++i) add_rms_norm(call, i, i + 1), add_rms_norm_backward(back, i, i + 1);
  expect_same(normed, normed_again, "norm", C);
  expect_same(dx, dx_again, "dx", C);
}

template <class T, class V>
void check_heads(int64_t B, int64_t T_, int64_t H, int64_t H_kv, int64_t D, bool norm, bool rotary, bool with_rows) {
  const int64_t rows = B * T_, half = D / 2, width = (H + 2 * H_kv) * D;
  const auto qkv = draw<T>(rows * width), dq = draw<T>(rows * H * D), dk = draw<T>(rows * H_kv * D),
             dv = draw<T>(rows * H_kv * D);
  const auto values = draw<V>(rows * H_kv * D);
  std::vector<Real<T>> cos(T_ * half), sin(T_ * half);
  for (int64_t i = 0; i < T_ * half; ++i) {
    const double angle = 0.7 * static_cast<double>(i);
    cos[i] = static_cast<Real<T>>(std::cos(angle)), sin[i] = static_cast<Real<T>>(std::sin(angle));
  }
  std::vector<T> q(rows * H * D), k(rows * H_kv * D), v(rows * H_kv * D), dqkv(rows * width), dqkv_again(rows * width);
  std::vector<V> dvalues(rows * H_kv * D);
  const QkvHeads heads{kType<T>, kType<V>, T_, H, H_kv, D, norm, rotary ? cos.data() : nullptr,
                       rotary ? sin.data() : nullptr};
  qkv_heads(heads, {{qkv.data(), width}, {with_rows ? values.data() : nullptr, H_kv * D}, q.data(), k.data(), v.data()}, 0,
            rows);
  // Gradients in (B, heads, T, D) memory, which is not the layout of the heads.
  QkvHeadsBackward back{{qkv.data(), width},
                        {dq.data(), H * T_ * D, T_ * D, D},
                        {dk.data(), H_kv * T_ * D, T_ * D, D},
                        {dv.data(), H_kv * T_ * D, T_ * D, D},
                        dqkv.data(),
                        dvalues.data()};
  qkv_heads_backward(heads, back, 0, rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / T_, t = row % T_;
    for (int64_t h = 0; h < H + 2 * H_kv; ++h) {
      const T* x = qkv.data() + row * width + h * D;
      const T* dx = dqkv.data() + row * width + h * D;
      if (h >= H + H_kv) {
        const int64_t g = h - H - H_kv, at = (row * H_kv + g) * D, given = ((b * H_kv + g) * T_ + t) * D;
        for (int64_t i = 0; i < D; ++i) {
          expect(widen(v[at + i]), widen(x[i]) + (with_rows ? widen(values[at + i]) : 0), kTolerance<T>, "v", D);
          expect(widen(dx[i]), widen(dv[given + i]), 0, "dv", D);
          expect(widen(dvalues[at + i]), widen(dv[given + i]), 0, "dvalues", D);
        }
        continue;
      }
      const T* y = h < H ? q.data() + (row * H + h) * D : k.data() + (row * H_kv + h - H) * D;
      const T* dy = h < H ? dq.data() + ((b * H + h) * T_ + t) * D : dk.data() + ((b * H_kv + h - H) * T_ + t) * D;
      double squares = 0, dot = 0;
      std::vector<double> d(D), n(D);
      for (int64_t i = 0; i < D; ++i) squares += widen(x[i]) * widen(x[i]), d[i] = widen(dy[i]);
      const double r = norm ? 1 / std::sqrt(squares / static_cast<double>(D) + kRmsEps) : 1;
      for (int64_t i = 0; i < D; ++i) n[i] = widen(x[i]) * r;
      for (int64_t i = 0; rotary && i < half; ++i) {
        const double c = cos[t * half + i], s = sin[t * half + i], a = n[i], e = n[i + half];
        n[i] = a * c - e * s, n[i + half] = a * s + e * c;
        const double da = d[i], de = d[i + half];
        d[i] = da * c + de * s, d[i + half] = de * c - da * s;
      }
      for (int64_t i = 0; i < D; ++i) dot += widen(x[i]) * d[i];
      for (int64_t i = 0; i < D; ++i) {
        expect(widen(y[i]), n[i], kTolerance<T>, "head", D);
        const double shrink = norm ? r * r * r * dot / static_cast<double>(D) : 0;
        expect(widen(dx[i]), r * d[i] - shrink * widen(x[i]), kTolerance<T>, "dhead", D);
      }
    }
  }
  back.dqkv = dqkv_again.data();
  for (int64_t row = 0; row < rows; ++row) qkv_heads_backward(heads, back, row, row + 1);
  expect_same(dqkv, dqkv_again, "dqkv", D);
}

template <class T>
void check_relu(int64_t n) {
  const auto x = draw<T>(n), dy = draw<T>(n);
  std::vector<T> y(n), dx(n);
  for (int64_t begin = 0; begin < n; begin += 37) {
    const int64_t end = begin + 37 < n ? begin + 37 : n;
    relu_squared(kType<T>, x.data(), y.data(), begin, end);
    relu_squared_backward(kType<T>, x.data(), dy.data(), dx.data(), begin, end);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double positive = std::fmax(widen(x[i]), 0);
    expect(widen(y[i]), positive * positive, kTolerance<T>, "relu squared", n);
    expect(widen(dx[i]), 2 * positive * widen(dy[i]), kTolerance<T>, "its gradient", n);
  }
}

template <class T, class V>
void check_all_heads() {
  for (const int64_t D : {1, 2, 7, 8, 16, 30, 31, 32, 34, 64, 80}) {
    for (const bool norm : {false, true}) {
      for (const bool rotary : {false, true}) {
        if (rotary && D % 2 == 1) continue;
        check_heads<T, V>(2, 3, 2, 1, D, norm, rotary, true);
        check_heads<T, V>(1, 1, 1, 1, D, norm, rotary, false);
      }
    }
  }
}

}  // namespace

int main() {
  for (const int64_t C : {1, 2, 7, 8, 15, 16, 17, 31, 64, 65, 255, 256, 257, 1000}) {
    for (const bool branch : {false, true}) {
      check_norm<float, float, float>(3, C, branch);
      check_norm<float, float, Half>(3, C, branch);
      check_norm<float, Half, float>(3, C, branch);
      check_norm<float, Half, Half>(3, C, branch);
      check_norm<Half, Half, Half>(3, C, branch);
      check_norm<double, double, double>(3, C, branch);
    }
  }
  check_all_heads<float, float>();
  check_all_heads<double, double>();
  check_all_heads<Half, Half>();
  check_all_heads<Half, float>();
  for (const int64_t n : {0, 1, 7, 16, 17, 100, 1000}) check_relu<float>(n), check_relu<double>(n), check_relu<Half>(n);
  std::printf("block on %s: %d failures\n", block_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
