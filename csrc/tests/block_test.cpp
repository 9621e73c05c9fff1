// Runs block.cpp without torch, for the sanitizers: every buffer ends where its tensor ends, results are compared with
// float64 loops, and all ways to split the rows must give the same bits. `make sanitize` runs it on every code path.

#include "../common/philox.h"
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

// Whether element i of a row survives: Philox 4x32-7, written out.
bool survives(const Dropout& dropout, int64_t row, int64_t i) {
  uint32_t c[4] = {static_cast<uint32_t>(i / 8), static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0};
  uint32_t k[2] = {static_cast<uint32_t>(dropout.seed), static_cast<uint32_t>(dropout.seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * kPhiloxFactor0, p1 = uint64_t{c[2]} * kPhiloxFactor1;
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::memcpy(c, next, sizeof c);
    k[0] += kPhiloxKeyStep0, k[1] += kPhiloxKeyStep1;
  }
  const uint32_t word = c[i % 8 / 2];
  return (i % 2 == 0 ? word & 0xffff : word >> 16) >= dropout.p * kDropoutUnit;
}

struct NormCase {
  Norm norm;
  bool x, y, dropout, weight, bias;
};

template <class X, class Y, class N>
void check_norm(int64_t rows, int64_t C, const NormCase& which) {
  using R = Real<X>;
  const auto x = draw<X>(rows * C), dsum = draw<X>(rows * C);
  const auto y = draw<Y>(rows * C);
  const auto dnormed = draw<N>(rows * C);
  const auto weight = draw<R>(C), bias = draw<R>(C);
  const int64_t block = 2, blocks = (rows + 1) / 2;
  std::vector<X> sum(rows * C), dx(rows * C), dx_again(rows * C);
  std::vector<N> normed(rows * C), normed_again(rows * C);
  std::vector<Y> dy(rows * C);
  std::vector<R> mean(rows), rstd(rows), dweight(blocks * C), dbias(blocks * C), dweight_again(blocks * C);
  const bool norm = which.norm != Norm::kNone;
  const Dropout dropout{which.dropout, 0.25, 0x123456789abcdef0};
  AddNorm call{.x_type = kType<X>,
               .y_type = kType<Y>,
               .normed_type = kType<N>,
               .norm = which.norm,
               .dropout = dropout,
               .C = C,
               .x = {which.x ? x.data() : nullptr, C},
               .y = {which.y ? y.data() : nullptr, C},
               .weight = which.weight ? weight.data() : nullptr,
               .bias = which.bias ? bias.data() : nullptr,
               .sum = which.y ? sum.data() : nullptr,
               .normed = norm ? normed.data() : nullptr,
               .mean = norm ? mean.data() : nullptr,
               .rstd = norm ? rstd.data() : nullptr};
  add_norm(call, 0, rows);
  const auto& s = which.y ? sum : x;
  AddNormBackward back{.x_type = kType<X>,
                       .y_type = kType<Y>,
                       .normed_type = kType<N>,
                       .norm = which.norm,
                       .dropout = dropout,
                       .C = C,
                       .rows = rows,
                       .block = block,
                       .sum = {s.data(), C},
                       .dsum = {dsum.data(), C},
                       .dnormed = {norm ? dnormed.data() : nullptr, C},
                       .weight = which.weight ? weight.data() : nullptr,
                       .mean = norm ? mean.data() : nullptr,
                       .rstd = norm ? rstd.data() : nullptr,
                       .dx = which.x ? dx.data() : nullptr,
                       .dy = which.y ? dy.data() : nullptr,
                       .dweight = which.weight ? dweight.data() : nullptr,
                       .dbias = which.bias ? dbias.data() : nullptr};
  add_norm_backward(back, 0, blocks);
  std::vector<double> dw(blocks * C), db(blocks * C);
  const auto at = [&](int64_t j) { return which.weight ? widen(weight[j]) : 1; };
  for (int64_t i = 0; i < rows; ++i) {
    const double count = static_cast<double>(C);
    double total = 0, squares = 0, gradients = 0, dot = 0;
    for (int64_t j = 0; j < C; ++j) total += widen(s[i * C + j]);
    const double m = which.norm == Norm::kLayer ? total / count : 0;
    for (int64_t j = 0; j < C; ++j) {
      const double c = widen(s[i * C + j]) - m, g = norm ? widen(dnormed[i * C + j]) * at(j) : 0;
      squares += c * c, gradients += g, dot += c * g;
    }
    const double r = 1 / std::sqrt(squares / count + (which.norm == Norm::kLayer ? kLayerEps : kRmsEps));
    for (int64_t j = 0; j < C; ++j) {
      const int64_t e = i * C + j;
      const double kept = !which.dropout ? 1 : survives(dropout, i, j) ? 4.0 / 3 : 0;
      if (which.y) expect(widen(sum[e]), (which.x ? widen(x[e]) : 0) + kept * widen(y[e]), kTolerance<X>, "sum", C);
      const double c = widen(s[e]) - m;
      double d = widen(dsum[e]);
      if (norm) {
        expect(widen(normed[e]), c * r * at(j) + (which.bias ? widen(bias[j]) : 0), kTolerance<N>, "norm", C);
        d += r * widen(dnormed[e]) * at(j) - c * r * r * r * dot / count;
        if (which.norm == Norm::kLayer) d -= r * gradients / count;
        dw[i / block * C + j] += widen(dnormed[e]) * c * r, db[i / block * C + j] += widen(dnormed[e]);
      }
      // LayerNorm of one channel is 0 / 0 but for its epsilon, and its slope 300.
      const double slack = which.norm == Norm::kLayer && C < 3 ? 100 : 1;
      if (which.x) expect(widen(dx[e]), d, slack * kTolerance<X>, "dx", C);
      if (which.y) expect(widen(dy[e]), kept * d, slack * kTolerance<Y>, "dy", C);
    }
  }
  for (int64_t i = 0; i < blocks * C; ++i) {
    if (which.weight) expect(dweight[i], dw[i], kTolerance<R>, "dweight", C);
    if (which.bias) expect(dbias[i], db[i], kTolerance<R>, "dbias", C);
  }
  if (norm) call.normed = normed_again.data();
  if (which.x) back.dx = dx_again.data();
  if (which.weight) back.dweight = dweight_again.data();
  for (int64_t i = 0; i < rows; ++i) add_norm(call, i, i + 1);
  for (int64_t i = 0; i < blocks; ++i) add_norm_backward(back, i, i + 1);
  if (norm) expect_same(normed, normed_again, "norm", C);
  if (which.x) expect_same(dx, dx_again, "dx", C);
  if (which.weight) expect_same(dweight, dweight_again, "dweight", C);
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

// What an activation makes of x, and of its gate, in float64.
double curve(Activation kind, double x) {
  switch (kind) {
    case Activation::kRelu: return std::fmax(x, 0);
    case Activation::kReluSquared: return std::fmax(x, 0) * std::fmax(x, 0);
    case Activation::kGelu: return x * 0.5 * std::erfc(-x / std::sqrt(2));
    case Activation::kGeluTanh: return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1)) * (x + 0.044715 * x * x * x)));
    default: return x / (1 + std::exp(-x));
  }
}
double slope(Activation kind, double x) {
  const double step = 1e-5;
  if (x == 0 && kind != Activation::kSwiglu) return kind == Activation::kRelu || kind == Activation::kReluSquared ? 0 : 0.5;
  return (curve(kind, x + step) - curve(kind, x - step)) / (2 * step);
}

template <class T>
void check_activation(Activation kind, int64_t rows, int64_t width) {
  const bool gate = kind == Activation::kSwiglu;
  const int64_t n = rows * width, count = gate ? rows : n, pitch = gate ? 2 * width : width;
  const auto x = draw<T>(rows * pitch), dy = draw<T>(n);
  std::vector<T> y(n), dx(rows * pitch);
  const ActivationCall call{
      .type = kType<T>, .kind = kind, .width = width, .x = x.data(), .dy = dy.data(), .y = y.data(), .dx = dx.data()};
  const int64_t piece = gate ? 1 : 37;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t end = begin + piece < count ? begin + piece : count;
    activation(call, begin, end);
    activation_backward(call, begin, end);
  }
  const double tolerance = std::fmax(kTolerance<T>, 1e-8);  // of a difference quotient
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i / width * pitch + i % width;
    const double h = gate ? widen(x[at + width]) : 1, value = curve(kind, widen(x[at]));
    expect(widen(y[i]), value * h, kTolerance<T>, "activation", n);
    expect(widen(dx[at]), slope(kind, widen(x[at])) * h * widen(dy[i]), tolerance, "its gradient", n);
    if (gate) expect(widen(dx[at + width]), value * widen(dy[i]), kTolerance<T>, "the gate's other gradient", n);
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
    for (const Norm norm : {Norm::kNone, Norm::kLayer, Norm::kRms}) {
      const bool some = norm != Norm::kNone;
      for (const NormCase& which : {NormCase{norm, true, true, false, false, false}, {norm, true, false, false, some, false},
                                    {norm, true, true, true, some, some}, {norm, false, true, true, some, some}}) {
        check_norm<float, float, float>(3, C, which);
        check_norm<float, float, Half>(3, C, which);
        check_norm<float, Half, float>(3, C, which);
        check_norm<float, Half, Half>(3, C, which);
        check_norm<Half, Half, Half>(3, C, which);
        check_norm<double, double, double>(3, C, which);
      }
    }
  }
  check_all_heads<float, float>();
  check_all_heads<double, double>();
  check_all_heads<Half, Half>();
  check_all_heads<Half, float>();
  for (const auto kind : {Activation::kRelu, Activation::kReluSquared, Activation::kGelu, Activation::kSwiglu,
                          Activation::kGeluTanh}) {
    for (const int64_t n : {0, 1, 7, 16, 17, 100, 1000}) {
      check_activation<float>(kind, 1, n), check_activation<double>(kind, 1, n), check_activation<Half>(kind, 1, n);
      check_activation<float>(kind, 3, n), check_activation<double>(kind, 3, n), check_activation<Half>(kind, 3, n);
    }
  }
  std::printf("block on %s: %d failures\n", block_isa(), failures);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
