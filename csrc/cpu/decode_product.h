// Matrix products for decode_kernel.h, at each precision: what a matrix multiplies is rounded once into words, which then
// meet the words of the weights.
//
// A matrix's outputs lie side by side in a vector, and each input is multiplied into all of them: no sums across lanes,
// and every weight is loaded once for up to kRowTile tokens.

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

constexpr int kParts = static_cast<int>(kPanel) / kLanes<float>;  // vectors of a panel
constexpr int kWide = CHARGPT_ISA_LEVEL >= 2 ? 4 : CHARGPT_ISA_LEVEL == 1 ? 2 : 1;  // panels at once for one token
constexpr int kRowTile = CHARGPT_ISA_LEVEL >= 2 ? 4 : 2;                            // tokens at once for kTall panels
constexpr int kTall = CHARGPT_ISA_LEVEL >= 2 ? 2 : 1;

CHARGPT_INLINE float float_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// sum + the product of inputs with weights of 16 outputs: of one input in float32, of a pair in bfloat16.
CHARGPT_INLINE Vec<float> plus_one(Vec<float> sum, Vec<uint32_t> weight, uint32_t x) {
  return sum + (Vec<float>)weight * float_of(x);
}
CHARGPT_INLINE Vec<float> plus_pair(Vec<float> sum, Vec<uint32_t> weight, uint32_t x) {
#if CHARGPT_ISA_LEVEL >= 3
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)broadcast(x));
#else
  sum += (Vec<float>)(weight << 16) * float_of(x << 16);
  return sum + (Vec<float>)(weight & 0xFFFF0000) * float_of(x & 0xFFFF0000);
#endif
}

// The same for four inputs, exactly: weights are bytes without a sign, inputs bytes with one.
CHARGPT_INLINE Vec<int32_t> plus_four(Vec<int32_t> sum, Vec<uint32_t> weight, uint32_t x) {
#if CHARGPT_ISA_LEVEL >= 3
  return (Vec<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weight, (__m512i)broadcast(x));
#elif CHARGPT_ISA_LEVEL == 2
  const __m512i w = (__m512i)weight, inputs = (__m512i)broadcast(x);
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(inputs, 8), 8), odd = _mm512_srai_epi16(inputs, 8);
  sum += (Vec<int32_t>)_mm512_madd_epi16((__m512i)(weight & 0x00FF00FF), even);
  return sum + (Vec<int32_t>)_mm512_madd_epi16(_mm512_srli_epi16(w, 8), odd);
#elif CHARGPT_ISA_LEVEL == 1
  const __m256i w = (__m256i)weight, inputs = (__m256i)broadcast(x);
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(inputs, 8), 8), odd = _mm256_srai_epi16(inputs, 8);
  sum += (Vec<int32_t>)_mm256_madd_epi16((__m256i)(weight & 0x00FF00FF), even);
  return sum + (Vec<int32_t>)_mm256_madd_epi16(_mm256_srli_epi16(w, 8), odd);
#else
  for (int i = 0; i < 4; ++i) sum += (Vec<int32_t>)(weight >> 8 * i & 0xFF) * static_cast<int8_t>(x >> 8 * i);
  return sum;
#endif
}

// What a matrix multiplies: rows of words, as its precision wants them. In kInt8 with a scale for each group, and minus
// 128 times the group's sum, which takes away what the weights' bytes have too much.
struct Operand {
  uint32_t* words;
  int64_t stride;
  float* scale;
  int32_t* offset;
  int64_t groups;  // of a row
};

Operand operand_of(const DecodePass& pass, int thread) {
  return {pass.words + thread * kPassRows * pass.words_stride, pass.words_stride,
          pass.scale + thread * kPassRows * pass.groups, pass.offset + thread * kPassRows * pass.groups, pass.groups};
}

CHARGPT_INLINE Vec<float> load_upto(const float* x, int64_t n) {  // the first n of them, and zeros
  return n >= kLanes<float> ? load<float>(x) : n > 0 ? load_first<float>(x, static_cast<int>(n)) : Vec<float>{};
}

void to_whole_numbers(const float* x, int64_t n, uint32_t* words, float* scale, int32_t* offset) {  // of one group
  typedef int8_t Bytes __attribute__((vector_size(kLanes<float>)));
  constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  constexpr int kVectors = static_cast<int>(kGroup) / kLanes<float>;
  Vec<float> v[kVectors];
  Vec<int32_t> highest{}, sum{};
  for (int i = 0; i < kVectors; ++i) {
    v[i] = load_upto(x + i * kLanes<float>, n - i * kLanes<float>);
    highest = maximum<int32_t>(highest, (Vec<int32_t>)v[i] & 0x7FFFFFFF);  // as integers, where NaN is above all
  }
  const float top = float_of(static_cast<uint32_t>(maximum_of<int32_t>(highest)));
  const float inverse = top < 1e-30f ? 0 : 127 / top;
  for (int i = 0; i < kVectors; ++i) {
    const Vec<int32_t> whole = (Vec<int32_t>)(v[i] * inverse + kShift) - 0x4B400000;
    const Bytes bytes = __builtin_convertvector(whole, Bytes);
    __builtin_memcpy(words + i * kLanes<float> / 4, &bytes, sizeof bytes);
    sum += whole;
  }
  *scale = top / 127;
  *offset = -128 * sum_of<int32_t>(sum);
}

void prepare_row(const Linear& linear, const float* x, const Operand& to, int64_t row) {
  uint32_t* words = to.words + row * to.stride;
  const int64_t K = linear.K;
  switch (linear.precision) {
    case Precision::kFloat:
      for (int64_t i = 0; i < K; i += kLanes<float>) store<float>(words + i, load_upto(x + i, K - i));
      break;
    case Precision::kHalf:
      for (int64_t i = 0; i < K; i += kLanes<float>) {
        const HalfVec half = narrow(load_upto(x + i, K - i));
        __builtin_memcpy(words + i / 2, &half, sizeof half);
      }
      break;
    case Precision::kInt8:
      for (int64_t g = 0; g * kGroup < K; ++g) {
        to_whole_numbers(x + g * kGroup, K - g * kGroup, words + g * (kGroup / 4), to.scale + row * to.groups + g,
                         to.offset + row * to.groups + g);
      }
  }
}

enum class Into { kStore, kAdd, kRelu, kReluSquared, kGelu };

struct Product {
  const Linear& linear;
  Operand x;
  float* y;
  int64_t y_stride;
  Into into;
};

// x Φ(x). With z = |x|/√2 and t = 1/(1 + 0.42 z), Φ(-|x|) = exp(-z²) t P(t) / 2: the form of Hastings 1955,
// "Approximations for Digital Computers". P, of degree 7, is fitted for the least relative error, 1.7e-7.
CHARGPT_INLINE Vec<float> gelu(Vec<float> x) {
  constexpr float kP[] = {0.236824423f,  0.239583016f, 0.194743212f,  0.268687486f,
                          -0.130424119f, 0.440563449f, -0.320193909f, 0.0702162717f};
  const Vec<float> z = (x < 0.0f ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.42f * z);
  Vec<float> y = broadcast(kP[7]);
#pragma GCC unroll 7
  for (int i = 6; i >= 0; --i) y = y * t + kP[i];
  const Vec<float> tail = 0.5f * t * y * exponential(-z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}

CHARGPT_INLINE void finish(Into into, Vec<float> v, float* y) {
  switch (into) {
    case Into::kStore: break;
    case Into::kAdd: v += load<float>(y); break;
    case Into::kRelu: v = v < 0.0f ? broadcast(0.0f) : v; break;
    case Into::kReluSquared: v = v < 0.0f ? broadcast(0.0f) : v; v *= v; break;
    case Into::kGelu: v = gelu(v); break;
  }
  store<float>(y, v);
}

// Panels [panel, panel + P) of y for M tokens from `row` on. Even and odd words are added up apart, whatever M and P are.
template <Precision kind, int M, int P>
CHARGPT_INLINE void add_up(const Product& product, int64_t panel, int64_t row, Vec<float> (*y)[P * kParts]) {
  const int64_t words = product.linear.words();
  const uint32_t* weight = product.linear.weight.data() + panel * words * kPanel;
  const uint32_t* x = product.x.words + row * product.x.stride;
  Vec<float> odd[M][P * kParts]{};
  for (int64_t i = 0; i < words; i += 2) {
#pragma GCC unroll 16
    for (int v = 0; v < P * kParts; ++v) {
      const uint32_t* w = weight + (v / kParts * words + i) * kPanel + v % kParts * kLanes<float>;
      const Vec<uint32_t> first = load<uint32_t>(w), second = load<uint32_t>(w + kPanel);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const uint32_t* here = x + m * product.x.stride + i;
        if constexpr (kind == Precision::kHalf) {
          y[m][v] = plus_pair(y[m][v], first, here[0]);
          odd[m][v] = plus_pair(odd[m][v], second, here[1]);
        } else {
          y[m][v] = plus_one(y[m][v], first, here[0]);
          odd[m][v] = plus_one(odd[m][v], second, here[1]);
        }
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < P * kParts; ++v) y[m][v] += odd[m][v];
  }
}

template <int M, int P>
CHARGPT_INLINE void add_up_groups(const Product& product, int64_t panel, int64_t row, Vec<float> (*y)[P * kParts]) {
  constexpr int kVectors = P * kParts;
  constexpr int64_t kWords = kGroup / 4;
  const int64_t groups = product.linear.words() / kWords;
  for (int64_t g = 0; g < groups; ++g) {
    const uint32_t* weight = product.linear.weight.data() + (panel * groups + g) * kWords * kPanel;
    const float* scale = product.linear.scale.data() + (panel * groups + g) * kPanel;
    const uint32_t* x = product.x.words + row * product.x.stride + g * kWords;
    Vec<int32_t> sum[M][kVectors];
    for (int m = 0; m < M; ++m) {
      for (int v = 0; v < kVectors; ++v) sum[m][v] = broadcast(product.x.offset[(row + m) * product.x.groups + g]);
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kWords; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) {
        const Vec<uint32_t> w =
            load<uint32_t>(weight + (v / kParts * groups * kWords + i) * kPanel + v % kParts * kLanes<float>);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) sum[m][v] = plus_four(sum[m][v], w, x[m * product.x.stride + i]);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      const Vec<float> of_weight = load<float>(scale + v / kParts * groups * kPanel + v % kParts * kLanes<float>);
      for (int m = 0; m < M; ++m) {
        const float of_input = product.x.scale[(row + m) * product.x.groups + g];
        y[m][v] += __builtin_convertvector(sum[m][v], Vec<float>) * (of_weight * of_input);
      }
    }
  }
}

template <Precision kind, int M, int P>
CHARGPT_INLINE void multiply(const Product& product, int64_t panel, int64_t row) {
  Vec<float> y[M][P * kParts]{};
  if constexpr (kind == Precision::kInt8) {
    add_up_groups<M, P>(product, panel, row, y);
  } else {
    add_up<kind, M, P>(product, panel, row, y);
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < P * kParts; ++v) {
      const int64_t n = panel * kPanel + v * kLanes<float>;
      finish(product.into, y[m][v] + load<float>(product.linear.bias.data() + n),
             product.y + (row + m) * product.y_stride + n);
    }
  }
}

template <Precision kind>
void multiply_panels(const Product& product, int64_t rows, int64_t begin, int64_t end) {
  if (rows == 1) {
    for (; begin + kWide <= end; begin += kWide) multiply<kind, 1, kWide>(product, begin, 0);
    for (; begin + kTall <= end; begin += kTall) multiply<kind, 1, kTall>(product, begin, 0);
    for (; begin < end; ++begin) multiply<kind, 1, 1>(product, begin, 0);
    return;
  }
  for (; begin < end; begin += kTall) {
    int64_t row = 0;
    if (begin + kTall <= end) {
      for (; row + kRowTile <= rows; row += kRowTile) multiply<kind, kRowTile, kTall>(product, begin, row);
      for (; row < rows; ++row) multiply<kind, 1, kTall>(product, begin, row);
    } else {
      for (; row < rows; ++row) multiply<kind, 1, 1>(product, begin, row);
    }
  }
}

void multiply_share(const Product& product, int64_t rows, int thread, int threads) {
  const int64_t panels = padded(product.linear.N) / kPanel;
  const int64_t begin = panels * thread / threads, end = panels * (thread + 1) / threads;
  switch (product.linear.precision) {
    case Precision::kFloat: return multiply_panels<Precision::kFloat>(product, rows, begin, end);
    case Precision::kHalf: return multiply_panels<Precision::kHalf>(product, rows, begin, end);
    case Precision::kInt8: return multiply_panels<Precision::kInt8>(product, rows, begin, end);
  }
}

}  // namespace
}  // namespace chargpt::cpu::CHARGPT_ISA
