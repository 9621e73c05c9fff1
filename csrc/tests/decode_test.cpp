// Runs decode.cpp without torch, for the sanitizers: every table ends where it ends, and the bits of a stream's logits
// are the same for any number of threads, beside any others, read at once or token by token. `make sanitize` runs it on
// every code path, under ThreadSanitizer too. That the logits are right is for tests/generation/test_native.py.

#include "../cpu/decode.h"
#include "../cpu/decode_draw.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

using namespace chargpt::cpu;

namespace {

int failures = 0;
std::mt19937 random_bits(1);

// Memory that ends where its numbers end, unlike a vector's, which may have more.
struct Tables {
  std::vector<std::unique_ptr<float[]>> kept;

  const float* draw(int64_t n) {
    std::normal_distribution<float> normal(0, 0.4f);
    kept.push_back(std::make_unique<float[]>(n));
    for (int64_t i = 0; i < n; ++i) kept.back()[i] = normal(random_bits);
    return kept.back().get();
  }
};

struct Shape {
  int64_t V, block_size, C, H, H_kv, hidden;
  Norm norm;
  Activation activation;
  bool rotary;
  Precision precision;
};

DecodeModel make(const Shape& shape, Tables* tables) {
  const int64_t C = shape.C, D = C / shape.H, kv = shape.H_kv * D;
  const bool gains = shape.norm == Norm::kLayer;
  const auto gain = [&] { return gains ? Gain{tables->draw(C), tables->draw(C)} : Gain{}; };
  const auto linear = [&](int64_t N, int64_t K) { return Linear(tables->draw(N * K), tables->draw(N), N, K, shape.precision); };
  DecodeModel model{.precision = shape.precision,
                    .V = shape.V,
                    .block_size = shape.block_size,
                    .C = C,
                    .H = shape.H,
                    .H_kv = shape.H_kv,
                    .D = D,
                    .hidden = shape.hidden,
                    .norm = shape.norm,
                    .activation = shape.activation,
                    .qk_norm = shape.rotary,
                    .softcap = shape.rotary ? 5.0f : 0.0f,
                    .token_embedding = tables->draw(shape.V * C),
                    .bigram_embedding = tables->draw(7 * C),
                    .bigram_rows = 7,
                    .position_embedding = shape.rotary ? nullptr : tables->draw(shape.block_size * C),
                    .cos = shape.rotary ? tables->draw(shape.block_size * (D / 2)) : nullptr,
                    .sin = shape.rotary ? tables->draw(shape.block_size * (D / 2)) : nullptr,
                    .layers = {},
                    .last_norm = gain(),
                    .head = linear(shape.V, C)};
  for (int layer = 0; layer < 2; ++layer) {
    DecodeLayer made{.attention_norm = gain(),
                     .mlp_norm = gain(),
                     .qkv = linear(C + 2 * kv, C),
                     .projection = linear(C, C),
                     .expand = {},
                     .contract = {},
                     .value_embedding = shape.rotary ? tables->draw(shape.V * kv) : nullptr};
    if (shape.activation != Activation::kNone) {
      made.expand = linear(shape.hidden * (shape.activation == Activation::kSwiglu ? 2 : 1), C);
      made.contract = linear(C, shape.hidden);
    }
    model.layers.push_back(std::move(made));
  }
  return model;
}

std::vector<int32_t> window(int64_t size, int64_t V) {
  std::vector<int32_t> tokens(size);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random_bits() % V);
  return tokens;
}

std::vector<float> logits_of(const Decoder& decoder, int64_t stream, int64_t V) {
  const float* row = decoder.logits() + stream * padded(V);
  return {row, row + V};
}

void check(const Shape& shape) {
  Tables tables;
  const auto model = [&, seed = random_bits()] {
    random_bits.seed(seed);
    return make(shape, &tables);
  };
  const std::vector<std::vector<int32_t>> windows{window(shape.block_size, shape.V), window(1, shape.V),
                                                  window(shape.block_size / 2, shape.V)};
  const float* bias = tables.draw(shape.V);
  const auto options = [&](uint32_t sample, int64_t keep) {
    return StreamOptions{.draw = {.temperature = 0.9, .top_k = 5, .top_p = 0.95, .min_p = 0.01},
                         .bias = {bias, bias + shape.V},
                         .seed = 7,
                         .sample = sample,
                         .keep = std::min(keep, shape.block_size)};
  };
  std::vector<std::vector<float>> alone;
  std::vector<std::vector<int64_t>> drawn;  // by each, alone
  for (uint32_t i = 0; i < 3; ++i) {
    const auto& tokens = windows[i];
    Decoder decoder(model(), 1, 1);
    decoder.begin(0, {tokens[0]}, options(i, 1));
    for (size_t t = 1; t < tokens.size(); ++t) {
      decoder.read(1);
      decoder.append(0, tokens[t]);
    }
    decoder.read(1);
    alone.push_back(logits_of(decoder, 0, shape.V));
    for (float x : alone.back()) failures += !std::isfinite(x);
    decoder.begin(0, tokens, options(i, 3));
    std::vector<float> logprobs(20);
    failures += !decoder.generate(20, 1, drawn.emplace_back(20).data(), logprobs.data(), nullptr);
    for (float x : logprobs) failures += !(x < 1e-5f && std::isfinite(x));
  }
  for (int threads : {1, 2, 3}) {
    Decoder decoder(model(), 4, threads);
    for (uint32_t i = 0; i < 3; ++i) decoder.begin(i + 1, windows[i], options(i, 1));
    decoder.read(threads);
    for (int64_t i = 0; i < 3; ++i) {
      if (logits_of(decoder, i, shape.V) != alone[i] && ++failures <= 10) {
        std::printf("C %ld, %d threads: stream %ld differs\n", static_cast<long>(shape.C), threads, static_cast<long>(i));
      }
    }
    for (uint32_t i = 0; i < 4; ++i) decoder.begin(i, windows[0], options(0, 1));  // read once for all
    decoder.read(threads);
    for (int64_t i = 0; i < 4; ++i) failures += logits_of(decoder, i, shape.V) != alone[0];
    for (uint32_t i = 0; i < 4; ++i) decoder.end(i);

    // The second joins five draws after the first, the third ten, and each leaves after twenty of its own.
    std::vector<std::vector<int64_t>> got(3);
    for (int64_t step = 0; step < 30; step += 5) {
      for (uint32_t i = 0; i < 3; ++i) {
        if (step == 5 * i) decoder.begin(3 - i, windows[i], options(i, 3));
        if (step == 5 * i + 20) decoder.end(3 - i);
      }
      const size_t running = decoder.running().size();
      std::vector<int64_t> out(5 * running);
      std::vector<float> logprobs(5 * running), all(5 * running * shape.V);
      failures += !decoder.generate(5, threads, out.data(), logprobs.data(), all.data());
      for (size_t n = 0; n < 5 * running; ++n) got[3 - decoder.running()[n % running]].push_back(out[n]);
    }
    failures += got != drawn;
  }
}

void check_drawing() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::nanf("");
  for (const auto& [logits, wanted] : std::vector<std::pair<std::vector<float>, int64_t>>{
           {{0, nan}, -1}, {{nan, 0}, -1}, {{infinity, 0}, -1}, {{-infinity, -infinity}, -1}, {{-infinity, 3}, 1}}) {
    for (double temperature : {0.0, 1.0}) {
      const DrawOptions options{.temperature = temperature};
      failures += draw_token(logits.data(), static_cast<int64_t>(logits.size()), options, 0.999) != wanted;
    }
  }
  const float even[] = {1, 1, 1, 1};
  for (int64_t token = 0; token < 4; ++token) failures += draw_token(even, 4, {}, 0.25 * token + 0.1) != token;
  failures += draw_token(even, 4, {.top_k = 2}, 0.99) != 1 || draw_token(even, 4, {.top_p = 0.5}, 0.99) != 1;
}

}  // namespace

int main() {
  for (Precision precision : {Precision::kFloat, Precision::kHalf, Precision::kInt8}) {
    check({11, 8, 24, 4, 4, 96, Norm::kLayer, Activation::kGelu, false, precision});
    check({65, 33, 32, 2, 1, 128, Norm::kRms, Activation::kReluSquared, true, precision});
    check({130, 70, 48, 4, 2, 67, Norm::kRms, Activation::kSwiglu, true, precision});
    check({3, 5, 15, 3, 3, 19, Norm::kLayer, Activation::kRelu, false, precision});
    check({300, 2, 1, 1, 1, 1, Norm::kNone, Activation::kNone, false, precision});
  }
  check_drawing();
  std::printf(failures == 0 ? "decode: all right\n" : "decode: %d failures\n", failures);
  return failures != 0;
}
