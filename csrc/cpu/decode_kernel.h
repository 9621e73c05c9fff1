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

enum class Into { kStore, kAdd, kRelu, kReluSquared, kGelu };

struct Product {
  const Linear& linear;
  const float* x;  // rows of x_stride, which is even: zeros follow an odd K
  int64_t x_stride;
  float* y;
  int64_t y_stride;
  Into into;
};

CHARGPT_INLINE Vec<float> gelu(Vec<float> x) {  // x Φ(x)
  float lanes[kLanes<float>];
  store<float>(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * (1.0f + std::erf(lane * 0.70710678118f));
  return load<float>(lanes);
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

// Panels [panel, panel + P) of y for M tokens from `row` on. Even and odd inputs are added up apart, whatever M and P are.
template <bool kHalf, int M, int P>
CHARGPT_INLINE void multiply(const Product& product, int64_t panel, int64_t row) {
  constexpr int kVectors = P * kParts, kWords = kHalf ? kPanel : 2 * kPanel;  // of one panel and one pair of inputs
  const int64_t pairs = (product.linear.K + 1) / 2;
  const uint32_t* weight = product.linear.weight.data() + panel * pairs * kWords;
  const float* x = product.x + row * product.x_stride;
  Vec<float> even[M][kVectors]{}, odd[M][kVectors]{};
  for (int64_t pair = 0; pair < pairs; ++pair) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t* w = weight + (v / kParts * pairs + pair) * kWords + v % kParts * kLanes<float>;
      Vec<float> first, second;
      if constexpr (kHalf) {
        const Vec<uint32_t> both = load<uint32_t>(w);
        first = (Vec<float>)(both << 16);
        second = (Vec<float>)(both & 0xFFFF0000);
      } else {
        first = load<float>(w);
        second = load<float>(w + kPanel);
      }
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        even[m][v] += first * x[m * product.x_stride + 2 * pair];
        odd[m][v] += second * x[m * product.x_stride + 2 * pair + 1];
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t n = panel * kPanel + v * kLanes<float>;
      finish(product.into, even[m][v] + odd[m][v] + load<float>(product.linear.bias.data() + n),
             product.y + (row + m) * product.y_stride + n);
    }
  }
}

template <bool kHalf>
void multiply_panels(const Product& product, int64_t rows, int64_t begin, int64_t end) {
  if (rows == 1) {
    for (; begin + kWide <= end; begin += kWide) multiply<kHalf, 1, kWide>(product, begin, 0);
    for (; begin < end; ++begin) multiply<kHalf, 1, 1>(product, begin, 0);
    return;
  }
  for (; begin < end; begin += kTall) {
    int64_t row = 0;
    if (begin + kTall <= end) {
      for (; row + kRowTile <= rows; row += kRowTile) multiply<kHalf, kRowTile, kTall>(product, begin, row);
      for (; row < rows; ++row) multiply<kHalf, 1, kTall>(product, begin, row);
    } else {
      for (; row < rows; ++row) multiply<kHalf, 1, 1>(product, begin, row);
    }
  }
}

void multiply_share(const Product& product, int64_t rows, int thread, int threads) {
  const int64_t panels = padded(product.linear.N) / kPanel;
  const int64_t begin = panels * thread / threads, end = panels * (thread + 1) / threads;
  product.linear.half ? multiply_panels<true>(product, rows, begin, end)
                      : multiply_panels<false>(product, rows, begin, end);
}

float sum_of_squares(const float* x, int64_t n, float less) {
  Vec<float> total{};
  int64_t i = 0;
  for (; i + kLanes<float> <= n; i += kLanes<float>) {
    const Vec<float> v = load<float>(x + i) - less;
    total += v * v;
  }
  float sum = sum_of<float>(total);
  for (; i < n; ++i) sum += (x[i] - less) * (x[i] - less);
  return sum;
}

void normalise(Norm kind, const Gain& gain, const float* x, int64_t n, float* y) {
  float mean = 0, scale = 1;
  if (kind == Norm::kLayer) {
    for (int64_t i = 0; i < n; ++i) mean += x[i];
    mean /= static_cast<float>(n);
    scale = 1 / std::sqrt(sum_of_squares(x, n, mean) / static_cast<float>(n) + kLayerNormEps);
  } else if (kind == Norm::kRms) {
    scale = 1 / std::sqrt(sum_of_squares(x, n, 0) / static_cast<float>(n) + static_cast<float>(kRmsEps));
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

// Scores of a query with kBlocks times 16 keys. keys: for each 16 positions (D, 16).
template <int kBlocks>
CHARGPT_INLINE void score(const float* q, const float* keys, int64_t D, float scale, float* scores) {
  Vec<float> sum[kBlocks * kParts]{};
  for (int64_t d = 0; d < D; ++d) {
#pragma GCC unroll 16
    for (int v = 0; v < kBlocks * kParts; ++v) {
      sum[v] += load<float>(keys + (v / kParts * D + d) * kPanel + v % kParts * kLanes<float>) * q[d];
    }
  }
  for (int v = 0; v < kBlocks * kParts; ++v) store<float>(scores + v * kLanes<float>, sum[v] * scale);
}

// One query (D) over the first `count` keys and values. values: rows of padded(D). scores: room for padded(count).
void attend(const float* q, const float* keys, const float* values, int64_t count, int64_t D, float* scores, float* out) {
  const float scale = 1 / std::sqrt(static_cast<float>(D));
  const int64_t blocks = padded(count) / kPanel, width = padded(D);
  int64_t block = 0;
  for (; block + kWide <= blocks; block += kWide) {
    score<kWide>(q, keys + block * D * kPanel, D, scale, scores + block * kPanel);
  }
  for (; block < blocks; ++block) score<1>(q, keys + block * D * kPanel, D, scale, scores + block * kPanel);
  for (int64_t s = count; s < blocks * kPanel; ++s) scores[s] = -std::numeric_limits<float>::infinity();
  Vec<float> highest = load<float>(scores);
  for (int64_t s = kLanes<float>; s < blocks * kPanel; s += kLanes<float>) {
    highest = maximum<float>(highest, load<float>(scores + s));
  }
  const float top = maximum_of<float>(highest);
  Vec<float> total{};
  for (int64_t s = 0; s < blocks * kPanel; s += kLanes<float>) {
    const Vec<float> weight = exponential(load<float>(scores + s) - top);
    total += weight;
    store<float>(scores + s, weight);
  }
  // The keys behind the last weigh e^-87 each in the sum: nothing, in float32.
  const float share = 1 / sum_of<float>(total);
  for (int64_t d = 0; d < width; d += kLanes<float>) {
    Vec<float> sum[4]{};
    int64_t s = 0;
    for (; s + 4 <= count; s += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i] += load<float>(values + (s + i) * width + d) * scores[s + i];
    }
    for (; s < count; ++s) sum[0] += load<float>(values + s * width + d) * scores[s];
    float lanes[kLanes<float>];
    store<float>(lanes, ((sum[0] + sum[1]) + (sum[2] + sum[3])) * share);
    for (int64_t i = 0; i < kLanes<float> && d + i < D; ++i) out[d + i] = lanes[i];
  }
}

// Cache and attention of one layer: each thread takes whole streams' heads, so that it wrote all keys that it reads.
void attend_share(const DecodeModel& model, const DecodePass& pass, int64_t layer, int thread, int threads) {
  const int64_t D = model.D, group = model.H / model.H_kv, kv_offset = model.H * D;
  const DecodeLayer& weights = model.layers[layer];
  float* scores = pass.scores + thread * padded(model.block_size);
  for (int64_t r = 0; r < pass.count; ++r) {
    const Reading& reading = pass.readings[r];
    float* qkv = pass.qkv + r * pass.qkv_stride;
    for (int64_t g = 0; g < model.H_kv; ++g) {
      if ((reading.stream * model.H_kv + g) % threads != thread) continue;
      float* keys = pass.keys(reading.stream, layer, g);
      float* values = pass.values(reading.stream, layer, g);
      float *k = qkv + kv_offset + g * D, *v = k + model.H_kv * D;
      prepare_head(model, reading.position, k);
      float* column = keys + reading.position / kPanel * D * kPanel + reading.position % kPanel;
      for (int64_t d = 0; d < D; ++d) column[d * kPanel] = k[d];
      const float* more = weights.value_embedding;
      if (more != nullptr) more += (reading.token * model.H_kv + g) * D;
      for (int64_t d = 0; d < D; ++d) {
        values[reading.position * padded(D) + d] = more == nullptr ? v[d] : v[d] + more[d];
      }
      for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        prepare_head(model, reading.position, qkv + h * D);
        attend(qkv + h * D, keys, values, reading.position + 1, D, scores, pass.attended + r * pass.x_stride + h * D);
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
  for (int64_t i = 0; i < hidden; ++i) h[i] = h[i] / (1 + std::exp(-h[i])) * h[hidden + i];
}

void run_pass(const DecodeModel& model, const DecodePass& pass, Barrier& barrier, int thread, int threads) {
  const int64_t rows = pass.count, stride = pass.x_stride;
  float* normed = pass.normed + thread * kPassRows * stride;
  for (int64_t r = thread; r < rows; r += threads) embed(model, pass.readings[r], pass.x + r * stride);
  barrier.wait();
  for (int64_t layer = 0; layer < static_cast<int64_t>(model.layers.size()); ++layer) {
    const DecodeLayer& weights = model.layers[layer];
    for (int64_t r = 0; r < rows; ++r) {
      normalise(model.norm, weights.attention_norm, pass.x + r * stride, model.C, normed + r * stride);
    }
    multiply_share({weights.qkv, normed, stride, pass.qkv, pass.qkv_stride, Into::kStore}, rows, thread, threads);
    barrier.wait();
    attend_share(model, pass, layer, thread, threads);
    barrier.wait();
    multiply_share({weights.projection, pass.attended, stride, pass.x, stride, Into::kAdd}, rows, thread, threads);
    barrier.wait();
    if (model.activation == Activation::kNone) continue;
    for (int64_t r = 0; r < rows; ++r) {
      normalise(model.norm, weights.mlp_norm, pass.x + r * stride, model.C, normed + r * stride);
    }
    const Into into = model.activation == Activation::kRelu          ? Into::kRelu
                      : model.activation == Activation::kReluSquared ? Into::kReluSquared
                      : model.activation == Activation::kGelu        ? Into::kGelu
                                                                     : Into::kStore;
    multiply_share({weights.expand, normed, stride, pass.hidden, pass.hidden_stride, into}, rows, thread, threads);
    barrier.wait();
    if (model.activation == Activation::kSwiglu) {
      for (int64_t r = thread; r < rows; r += threads) swish(pass.hidden + r * pass.hidden_stride, model.hidden);
      barrier.wait();
    }
    multiply_share({weights.contract, pass.hidden, pass.hidden_stride, pass.x, stride, Into::kAdd}, rows, thread,
                   threads);
    barrier.wait();
  }
  int64_t finished = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (!pass.readings[r].last) continue;
    normalise(model.norm, model.last_norm, pass.x + r * stride, model.C, normed + finished * stride);
    ++finished;
  }
  if (finished == 0) return barrier.wait();  // before the pass changes
  const int64_t width = padded(model.V);
  multiply_share({model.head, normed, stride, pass.logits, width, Into::kStore}, finished, thread, threads);
  barrier.wait();
  if (model.softcap == 0) return;
  for (int64_t i = width * finished * thread / threads; i < width * finished * (thread + 1) / threads; ++i) {
    pass.logits[i] = model.softcap * std::tanh(pass.logits[i] / model.softcap);
  }
  barrier.wait();
}

}  // namespace

constexpr DecodeKernels kDecodeKernels{&run_pass};

}  // namespace chargpt::cpu::CHARGPT_ISA
