// One pass of a Transformer over a few tokens, compiled once for each instruction set by foreach_isa.h.
//
// Keys lie 16 positions side by side, so that a vector of scores comes from one pass over the channels. All threads run
// the same phases and share each phase's outputs among them: between two phases they meet at a barrier. What a phase
// needs of a token as a whole, its norm, every thread computes for itself, which is less than waiting.

#include "simd/simd.h"

#include "decode_product.h"

namespace chargpt::cpu::CHARGPT_ISA {
namespace {

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
