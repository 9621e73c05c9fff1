// One pass of a Transformer over a few tokens, compiled once for each instruction set by foreach_isa.h.
//
// A matrix's outputs lie side by side in a vector, and each input is multiplied into all of them: no sums across lanes,
// and every weight is loaded once for up to kRowTile tokens. Keys lie likewise, 16 positions side by side, so that
// a vector of scores comes from one pass over the channels. All threads run the same phases and share each phase's
// outputs among them: between two phases they meet at a barrier. What a phase needs of a token as a whole, its norm,
// every thread computes for itself, which is less than waiting.

#include "simd/simd.h"

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

// The sum of the n numbers, or of their squares, each less a number.
template <bool kSquares>
float sum_up(const float* x, int64_t n, float less) {
  Vec<float> total{};
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) {
    const Vec<float> v = load<float>(x + i) - less;
    total += kSquares ? v * v : v;
  }
  float sum = sum_of<float>(total);
  for (; i < n; ++i) sum += (x[i] - less) * (kSquares ? x[i] - less : 1);
  return sum;
}

void normalise(Norm kind, const Gain& gain, const float* x, int64_t n, float* y) {
  float mean = 0, scale = 1;
  if (kind == Norm::kLayer) {
    mean = sum_up<false>(x, n, 0) / static_cast<float>(n);
    scale = 1 / std::sqrt(sum_up<true>(x, n, mean) / static_cast<float>(n) + kLayerNormEps);
  } else if (kind == Norm::kRms) {
    scale = 1 / std::sqrt(sum_up<true>(x, n, 0) / static_cast<float>(n) + static_cast<float>(kRmsEps));
  }
  for (int64_t i = 0; i < n; ++i) y[i] = (x[i] - mean) * scale;
  if (gain.weight != nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] *= gain.weight[i];
  }
  if (gain.bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) y[i] += gain.bias[i];
  }
}

// A head of q or k in place: divided by its root mean square, and turned by the angles of its position.
void prepare_head(const DecodeModel& model, int64_t position, float* head) {
  const int64_t D = model.D;
  if (model.qk_norm) normalise(Norm::kRms, {}, head, D, head);
  if (model.cos == nullptr) return;
  const float *cos = model.cos + position * (D / 2), *sin = model.sin + position * (D / 2);
  for (int64_t i = 0; i < D / 2; ++i) {
    const float a = head[i], b = head[i + D / 2];
    head[i] = a * cos[i] - b * sin[i];
    head[i + D / 2] = a * sin[i] + b * cos[i];
  }
}

// Scores of a query with kBlocks times 16 keys. keys: for each 16 positions `words` times 16.
template <bool kHalf, int kBlocks>
CHARGPT_INLINE void score(const uint32_t* q, const uint32_t* keys, int64_t words, float scale, float* scores) {
  Vec<float> sum[kBlocks * kParts]{};
  for (int64_t i = 0; i < words; ++i) {
#pragma GCC unroll 16
    for (int v = 0; v < kBlocks * kParts; ++v) {
      const Vec<uint32_t> k = load<uint32_t>(keys + (v / kParts * words + i) * kPanel + v % kParts * kLanes<float>);
      sum[v] = kHalf ? plus_pair(sum[v], k, q[i]) : plus_one(sum[v], k, q[i]);
    }
  }
  for (int v = 0; v < kBlocks * kParts; ++v) store<float>(scores + v * kLanes<float>, sum[v] * scale);
}

// Of `count` words of weights and values, kVectors vectors side by side; four sums, whatever kVectors is.
template <bool kHalf, int kVectors>
CHARGPT_INLINE void mix(const uint32_t* weights, const uint32_t* values, int64_t count, int64_t width, float share,
                        float* out) {
  Vec<float> sum[4][kVectors]{};
  int64_t s = 0;
  for (; s + 4 <= count; s += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<uint32_t> here = load<uint32_t>(values + (s + i) * width + v * kLanes<float>);
        sum[i][v] = kHalf ? plus_pair(sum[i][v], here, weights[s + i]) : plus_one(sum[i][v], here, weights[s + i]);
      }
    }
  }
  for (; s < count; ++s) {
    for (int v = 0; v < kVectors; ++v) {
      const Vec<uint32_t> here = load<uint32_t>(values + s * width + v * kLanes<float>);
      sum[0][v] = kHalf ? plus_pair(sum[0][v], here, weights[s]) : plus_one(sum[0][v], here, weights[s]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store<float>(out + v * kLanes<float>, ((sum[0][v] + sum[1][v]) + (sum[2][v] + sum[3][v])) * share);
  }
}

// One query over the first `count` keys and values. values: rows of padded(D) words, of a position or, in bfloat16, of
// two. scores: room for padded(count), weights: as many words, out: padded(D).
template <bool kHalf>
void attend(const uint32_t* q, const uint32_t* keys, const uint32_t* values, int64_t count, int64_t D, float* scores,
            uint32_t* weights, float* out) {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const int64_t blocks = padded(count) / kPanel, width = padded(D), words = kHalf ? (D + 1) / 2 : D;
  int64_t block = 0;
  for (; block + kWide <= blocks; block += kWide) {
    score<kHalf, kWide>(q, keys + block * words * kPanel, words, scale, scores + block * kPanel);
  }
  for (; block < blocks; ++block) {
    score<kHalf, 1>(q, keys + block * words * kPanel, words, scale, scores + block * kPanel);
  }
  for (int64_t s = count; s < blocks * kPanel; ++s) scores[s] = -std::numeric_limits<float>::infinity();
  Vec<float> highest = load<float>(scores);
  for (int64_t s = kLanes<float>; s < blocks * kPanel; s += kLanes<float>) {
    highest = maximum<float>(highest, load<float>(scores + s));
  }
  const float top = maximum_of<float>(highest);
  Vec<float> total{};
  for (int64_t s = 0; s < blocks * kPanel; s += kLanes<float>) {
    Vec<float> weight = exponential(load<float>(scores + s) - top);
    weight = load<float>(scores + s) < -std::numeric_limits<float>::max() ? Vec<float>{} : weight;  // behind the last
    if constexpr (kHalf) {
      const HalfVec half = narrow(weight);
      __builtin_memcpy(weights + s / 2, &half, sizeof half);
      weight = widen(half);
    } else {
      store<float>(weights + s, weight);
    }
    total += weight;
  }
  const float share = 1 / sum_of<float>(total);
  const int64_t rows = kHalf ? (count + 1) / 2 : count;
  constexpr int kAtOnce = CHARGPT_ISA_LEVEL >= 2 ? 2 : 1;
  int64_t d = 0;
  for (; d + kAtOnce * kLanes<float> <= width; d += kAtOnce * kLanes<float>) {
    mix<kHalf, kAtOnce>(weights, values + d, rows, width, share, out + d);
  }
  for (; d < width; d += kLanes<float>) mix<kHalf, 1>(weights, values + d, rows, width, share, out + d);
}

uint32_t half_at(const float* x, int64_t i, int64_t n) {  // x[i], rounded; nothing from n on
  return i < n ? half_of(x[i]) : 0;
}

// A head's row of k or q, as the cache has it: `words`(D), `stride` apart.
template <bool kHalf>
void put_words(const float* head, int64_t D, uint32_t* words, int64_t stride) {
  if constexpr (kHalf) {
    for (int64_t i = 0; i < (D + 1) / 2; ++i) words[i * stride] = half_of(head[2 * i]) | half_at(head, 2 * i + 1, D) << 16;
  } else {
    for (int64_t d = 0; d < D; ++d) words[d * stride] = bits_of(head[d]);
  }
}

// Cache and attention of one layer: each thread takes whole streams' heads, so that it wrote all keys that it reads.
template <bool kHalf>
void attend_share(const DecodeModel& model, const DecodePass& pass, int64_t layer, int thread, int threads) {
  const int64_t D = model.D, group = model.H / model.H_kv, kv_offset = model.H * D;
  const DecodeLayer& weights = model.layers[layer];
  const int64_t slots = padded(model.block_size);
  float *scores = pass.scores + thread * slots, *out = pass.mixed + thread * padded(D);
  uint32_t *shares = pass.shares + thread * slots, *query = pass.query + thread * padded(D);
  for (int64_t r = 0; r < pass.count; ++r) {
    const Reading& reading = pass.readings[r];
    float* qkv = pass.qkv + r * pass.qkv_stride;
    for (int64_t g = 0; g < model.H_kv; ++g) {
      if ((reading.stream * model.H_kv + g) % threads != thread) continue;
      const int64_t words = kHalf ? (D + 1) / 2 : D, t = reading.position;
      uint32_t* keys = pass.keys(reading.stream, layer, g);
      uint32_t* values = pass.values(reading.stream, layer, g);
      float *k = qkv + kv_offset + g * D, *v = k + model.H_kv * D;
      prepare_head(model, t, k);
      put_words<kHalf>(k, D, keys + t / kPanel * words * kPanel + t % kPanel, kPanel);
      if (const float* more = weights.value_embedding; more != nullptr) {
        more += (reading.token * model.H_kv + g) * D;
        for (int64_t d = 0; d < D; ++d) v[d] += more[d];
      }
      uint32_t* row = values + (kHalf ? t / 2 : t) * padded(D);
      for (int64_t d = 0; d < D; ++d) {
        if constexpr (kHalf) {
          row[d] = t % 2 == 0 ? half_of(v[d]) : (row[d] & 0xFFFF) | half_of(v[d]) << 16;
        } else {
          row[d] = bits_of(v[d]);
        }
      }
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        prepare_head(model, t, qkv + h * D);
        put_words<kHalf>(qkv + h * D, D, query, 1);
        attend<kHalf>(query, keys, values, t + 1, D, scores, shares, out);
        std::memcpy(pass.attended + r * pass.x_stride + h * D, out, D * sizeof(float));
      }
    }
  }
}

void embed(const DecodeModel& model, const Reading& reading, float* x) {
  const int64_t C = model.C;
  for (int64_t c = 0; c < C; ++c) x[c] = model.token_embedding[reading.token * C + c];
  if (model.bigram_embedding != nullptr) {
    const float* pair = model.bigram_embedding + bigram_row(model, reading.before, reading.token) * C;
    for (int64_t c = 0; c < C; ++c) x[c] += pair[c];
  }
  if (model.position_embedding != nullptr) {
    for (int64_t c = 0; c < C; ++c) x[c] += model.position_embedding[reading.position * C + c];
  }
}

void swish(float* h, int64_t hidden) {  // silu(gate) · up, over the gate
  for (int64_t i = 0; i < hidden; i += kLanes<float>) {
    const Vec<float> gate = load_upto(h + i, hidden - i), e = exponential(gate < 0.0f ? gate : -gate);
    const Vec<float> result = gate * (gate < 0.0f ? e : broadcast(1.0f)) / (1.0f + e) * load_upto(h + hidden + i, hidden - i);
    if (i + kLanes<float> <= hidden) {
      store<float>(h + i, result);
    } else {
      store_first<float>(h + i, result, static_cast<int>(hidden - i));
    }
  }
}

void cap(float softcap, float* x, int64_t n) {  // softcap tanh(x / softcap); n is a multiple of kPanel
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> v = load<float>(x + i) / softcap, e = exponential(v < 0.0f ? 2.0f * v : -2.0f * v);
    const Vec<float> tanh = (1.0f - e) / (1.0f + e);
    store<float>(x + i, softcap * (v < 0.0f ? -tanh : tanh));
  }
}

float log_sum_exp(const float* x, int64_t n) {
  const Vec<float> nothing = broadcast(-std::numeric_limits<float>::infinity());
  Vec<float> highest = nothing, total{};
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> v = load_upto(x + i, n - i);
    highest = maximum<float>(highest, iota<float>() < static_cast<int32_t>(n - i) ? v : nothing);
  }
  const float top = maximum_of<float>(highest);
  for (int64_t i = 0; i < n; i += kLanes<float>) {
    const Vec<float> e = exponential(load_upto(x + i, n - i) - top);
    total += iota<float>() < static_cast<int32_t>(n - i) ? e : Vec<float>{};
  }
  return top + std::log(sum_of<float>(total));
}

void run_pass(const DecodeModel& model, const DecodePass& pass, Barrier& barrier, int thread, int threads) {
  const int64_t rows = pass.count, stride = pass.x_stride;
  const Operand operand = operand_of(pass, thread);
  float* normed = pass.normed + thread * stride;
  for (int64_t r = thread; r < rows; r += threads) embed(model, pass.readings[r], pass.x + r * stride);
  barrier.wait();
  for (int64_t layer = 0; layer < static_cast<int64_t>(model.layers.size()); ++layer) {
    const DecodeLayer& weights = model.layers[layer];
    for (int64_t r = 0; r < rows; ++r) {
      normalise(model.norm, weights.attention_norm, pass.x + r * stride, model.C, normed);
      prepare_row(weights.qkv, normed, operand, r);
    }
    multiply_share({weights.qkv, operand, pass.qkv, pass.qkv_stride, Into::kStore}, rows, thread, threads);
    barrier.wait();
    if (model.precision == Precision::kFloat) {
      attend_share<false>(model, pass, layer, thread, threads);
    } else {
      attend_share<true>(model, pass, layer, thread, threads);
    }
    barrier.wait();
    for (int64_t r = 0; r < rows; ++r) prepare_row(weights.projection, pass.attended + r * stride, operand, r);
    multiply_share({weights.projection, operand, pass.x, stride, Into::kAdd}, rows, thread, threads);
    barrier.wait();
    if (model.activation == Activation::kNone) continue;
    for (int64_t r = 0; r < rows; ++r) {
      normalise(model.norm, weights.mlp_norm, pass.x + r * stride, model.C, normed);
      prepare_row(weights.expand, normed, operand, r);
    }
    const Into into = model.activation == Activation::kRelu          ? Into::kRelu
                      : model.activation == Activation::kReluSquared ? Into::kReluSquared
                      : model.activation == Activation::kGelu        ? Into::kGelu
                                                                     : Into::kStore;
    multiply_share({weights.expand, operand, pass.hidden, pass.hidden_stride, into}, rows, thread, threads);
    barrier.wait();
    if (model.activation == Activation::kSwiglu) {
      for (int64_t r = thread; r < rows; r += threads) swish(pass.hidden + r * pass.hidden_stride, model.hidden);
      barrier.wait();
    }
    for (int64_t r = 0; r < rows; ++r) prepare_row(weights.contract, pass.hidden + r * pass.hidden_stride, operand, r);
    multiply_share({weights.contract, operand, pass.x, stride, Into::kAdd}, rows, thread, threads);
    barrier.wait();
  }
  int64_t finished = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (!pass.readings[r].last) continue;
    normalise(model.norm, model.last_norm, pass.x + r * stride, model.C, normed);
    prepare_row(model.head, normed, operand, finished++);
  }
  if (finished == 0) return barrier.wait();  // before the pass changes
  const int64_t width = padded(model.V);
  multiply_share({model.head, operand, pass.logits, width, Into::kStore}, finished, thread, threads);
  barrier.wait();
  for (int64_t i = thread; i < finished; i += threads) {
    float* logits = pass.logits + i * width;
    if (model.softcap != 0) cap(model.softcap, logits, width);
    pass.lse[i] = log_sum_exp(logits, model.V);
  }
  barrier.wait();
}

}  // namespace

constexpr DecodeKernels kDecodeKernels{&run_pass};

}  // namespace chargpt::cpu::CHARGPT_ISA
