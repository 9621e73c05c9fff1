// A decoder's state: what its streams hold, and the threads that run its passes. decode_kernel.h has the arithmetic.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <utility>

#include "../common/philox.h"
#include "block.h"  // kRmsEps
#include "simd/isa.h"

namespace chargpt::cpu {
namespace {

constexpr float kLayerNormEps = 1e-5f;
constexpr int64_t kPassRows = 64;  // the most tokens of one pass: their activations stay in the caches
constexpr int kSpins = 1000;       // some microseconds, before a waiting thread lets others have its core

// Where threads wait for one another. Between two phases little time passes, so they spin, but not for long: another
// process may have taken the core of the one they wait for.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
      if (spins >= kSpins) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// A token that a pass reads.
struct Reading {
  int64_t stream, position, token, before;  // before: the token in front of it, or itself at position 0
  bool last;                                // of its stream, so logits are wanted
};

struct DecodePass {
  const Reading* readings;
  int64_t count;  // at most kPassRows
  float *x, *attended;  // count rows of x_stride
  int64_t x_stride;
  float* qkv;
  int64_t qkv_stride;
  float* hidden;
  int64_t hidden_stride;
  float* logits;  // one row for each reading that is the last of its stream, padded(V) wide
  float *normed, *scores;  // of each thread: kPassRows rows of x_stride, and padded(block_size)
  float* cache;
  int64_t layers, heads, head_floats;  // head_floats: of keys and values of one head of one layer of one stream
  int64_t key_floats;                  // of these, the keys, which come first

  float* keys(int64_t stream, int64_t layer, int64_t head) const {
    return cache + ((stream * layers + layer) * heads + head) * head_floats;
  }
  float* values(int64_t stream, int64_t layer, int64_t head) const { return keys(stream, layer, head) + key_floats; }
};

struct DecodeKernels {
  void (*run_pass)(const DecodeModel&, const DecodePass&, Barrier&, int thread, int threads);
};

int64_t bigram_row(const DecodeModel& model, int64_t before, int64_t token) {
  const int64_t pair = before * model.V + token;
  if (model.bigram_rows == model.V * model.V) return pair;
  return pair * 2654435761 % (int64_t{1} << 32) % model.bigram_rows;
}

}  // namespace
}  // namespace chargpt::cpu

#define CHARGPT_KERNEL "../decode_kernel.h"
#include "simd/foreach_isa.h"

namespace chargpt::cpu {
namespace {

const DecodeKernels& kernels() {
  switch (best_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512Bf16:
      return avx512_bf16::kDecodeKernels;
    case Isa::kAvx512:
      return avx512::kDecodeKernels;
    case Isa::kAvx2:
      return avx2::kDecodeKernels;
#endif
    default:
      return plain::kDecodeKernels;
  }
}

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

uint32_t half_of(float x) {  // bfloat16, to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

}  // namespace

Linear::Linear(const float* from, const float* b, int64_t N, int64_t K, bool half)
    : N(N), K(K), half(half), bias(padded(N)) {
  const int64_t pairs = (K + 1) / 2, words = half ? kPanel : 2 * kPanel;
  weight.resize(padded(N) / kPanel * pairs * words);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t k = 0; k < K; ++k) {
      uint32_t* pair = weight.data() + (n / kPanel * pairs + k / 2) * words;
      const float w = from[n * K + k];
      if (half) {
        pair[n % kPanel] |= half_of(w) << (k % 2 * 16);
      } else {
        pair[k % 2 * kPanel + n % kPanel] = bits_of(w);
      }
    }
  }
  if (b != nullptr) std::copy(b, b + N, bias.begin());
}

// -------------------------------------------------------------------------------------------------------------- drawing

double uniform_number(uint64_t seed, uint32_t sample, uint32_t position) {
  uint32_t c0 = position, c1 = sample, c2 = 0, c3 = 1;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxFactor0} * c0, p1 = uint64_t{kPhiloxFactor1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  return static_cast<double>((uint64_t{c0} << 21) + (c1 >> 11)) * 0x1p-53;
}

int64_t draw_token(const float* logits, int64_t V, const DrawOptions& options, double uniform) {
  float top = logits[0];
  int64_t likeliest = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (!(logits[i] <= top)) top = logits[i], likeliest = i;  // a NaN too
    if (top != top) return -1;
  }
  if (std::isinf(top)) return -1;
  if (options.temperature == 0) return likeliest;
  thread_local std::vector<double> p;
  p.resize(V);
  double total = 0;
  for (int64_t i = 0; i < V; ++i) {
    total += p[i] = std::exp((static_cast<double>(logits[i]) - static_cast<double>(top)) / options.temperature);
  }
  for (double& x : p) x /= total;
  if (options.top_k > 0 || options.top_p < 1) {
    thread_local std::vector<int64_t> order;
    order.resize(V);
    for (int64_t i = 0; i < V; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [](int64_t a, int64_t b) { return p[a] > p[b]; });
    const int64_t kept = options.top_k > 0 ? std::min(options.top_k, V) : V;
    double sum = 0, before = 0;
    for (int64_t i = 0; i < kept; ++i) sum += p[order[i]];
    for (int64_t i = 0; i < V; ++i) {
      const double here = p[order[i]];
      if (i >= kept || (options.top_p < 1 && before >= options.top_p * sum)) p[order[i]] = 0;
      before += here;
    }
  }
  const double least = options.min_p * *std::max_element(p.begin(), p.end());
  total = 0;
  for (double& x : p) total += x = x < least ? 0 : x;
  double reached = 0;
  for (double& x : p) reached += x = static_cast<float>(x / total);
  const double wanted = uniform * reached;
  int64_t last = 0;
  reached = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (p[i] == 0) continue;
    last = i;
    if ((reached += p[i]) > wanted) break;
  }
  return last;
}

// -------------------------------------------------------------------------------------------------------------- streams

struct Decoder::State {
  const DecodeModel model;
  const int64_t streams;
  const int most_threads;
  std::vector<std::vector<int32_t>> windows;  // what each stream sees, and tokens that it has not read yet
  std::vector<int64_t> cached;                // how many of them it has read
  std::vector<float> x, attended, qkv, hidden, logits, normed, scores, cache;
  DecodePass pass;
  std::vector<Reading> readings;

  State(DecodeModel given, int64_t streams, int most_threads)
      : model(std::move(given)), streams(streams), most_threads(most_threads), windows(streams), cached(streams) {
    const int64_t stride = padded(model.C), D = model.D, slots = padded(model.block_size);
    const int64_t qkv_stride = padded((model.H + 2 * model.H_kv) * D);
    const int64_t hidden_stride = padded(model.hidden * (model.activation == Activation::kSwiglu ? 2 : 1)) + kPanel;
    const int64_t layers = static_cast<int64_t>(model.layers.size());
    x.resize(kPassRows * stride);
    attended.resize(kPassRows * stride);
    qkv.resize(kPassRows * qkv_stride);
    hidden.resize(kPassRows * hidden_stride);
    logits.resize(streams * padded(model.V));
    normed.resize(most_threads * kPassRows * stride);
    scores.resize(most_threads * slots);
    const int64_t head_floats = slots * (D + padded(D));
    cache.resize(streams * layers * model.H_kv * head_floats);
    pass = {.readings = nullptr,
            .count = 0,
            .x = x.data(),
            .attended = attended.data(),
            .x_stride = stride,
            .qkv = qkv.data(),
            .qkv_stride = qkv_stride,
            .hidden = hidden.data(),
            .hidden_stride = hidden_stride,
            .logits = nullptr,
            .normed = normed.data(),
            .scores = scores.data(),
            .cache = cache.data(),
            .layers = layers,
            .heads = model.H_kv,
            .head_floats = head_floats,
            .key_floats = slots * D};
  }

  void collect(int64_t keep);
  template <class Step>
  bool together(int threads, Step step);
};

// What no stream has read yet, stream after stream.
void Decoder::State::collect(int64_t keep) {
  readings.clear();
  for (int64_t i = 0; i < streams; ++i) {
    std::vector<int32_t>& window = windows[i];
    if (static_cast<int64_t>(window.size()) > model.block_size) {
      window.erase(window.begin(), window.end() - keep);
      cached[i] = 0;
    }
    const int64_t size = static_cast<int64_t>(window.size());
    for (int64_t t = cached[i]; t < size; ++t) {
      readings.push_back({i, t, window[t], window[t == 0 ? 0 : t - 1], t == size - 1});
    }
    cached[i] = size;
  }
}

// Runs `step(run)`, which calls `run` for passes over all of `readings` as often as it likes. The other threads live as
// long as that, and no longer.
template <class Step>
bool Decoder::State::together(int threads, Step step) {
  const auto run_pass = kernels().run_pass;
  Barrier barrier(threads);
  bool done = false;
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) {
    others.emplace_back([this, &barrier, &done, run_pass, thread, threads] {
      for (;;) {
        barrier.wait();  // until there is a pass, or no more
        if (done) return;
        run_pass(model, pass, barrier, thread, threads);
      }
    });
  }
  const auto finish = [&] {
    done = true;
    barrier.wait();
    for (std::thread& other : others) other.join();
  };
  try {
    const bool result = step([this, &barrier, run_pass, threads] {
      int64_t finished = 0;
      for (int64_t begin = 0; begin < static_cast<int64_t>(readings.size()); begin += kPassRows) {
        pass.readings = readings.data() + begin;
        pass.count = std::min<int64_t>(kPassRows, static_cast<int64_t>(readings.size()) - begin);
        pass.logits = logits.data() + finished * padded(model.V);
        for (int64_t r = 0; r < pass.count; ++r) finished += pass.readings[r].last;
        barrier.wait();
        run_pass(model, pass, barrier, 0, threads);
      }
    });
    finish();
    return result;
  } catch (...) {  // no memory for a window
    finish();
    throw;
  }
}

Decoder::Decoder(DecodeModel model, int64_t streams, int most_threads)
    : state_(std::make_unique<State>(std::move(model), streams, most_threads)) {}
Decoder::~Decoder() = default;

int64_t Decoder::streams() const { return state_->streams; }
int Decoder::most_threads() const { return state_->most_threads; }
const DecodeModel& Decoder::model() const { return state_->model; }

void Decoder::begin(std::vector<std::vector<int32_t>> windows) {
  state_->windows = std::move(windows);
  std::fill(state_->cached.begin(), state_->cached.end(), 0);
}

void Decoder::read(int64_t keep, int threads) {
  state_->together(threads, [this, keep](const auto& run) {
    state_->collect(keep);
    run();
    return true;
  });
}

const float* Decoder::logits() const { return state_->logits.data(); }

void Decoder::append(int64_t stream, int32_t token) { state_->windows[stream].push_back(token); }

bool Decoder::generate(int64_t count, int64_t position, uint64_t seed, int64_t keep, const DrawOptions& options,
                       int threads, int64_t* out) {
  return state_->together(threads, [=, this](const auto& run) {
    for (int64_t n = 0; n < count; ++n) {
      state_->collect(keep);
      run();
      for (int64_t i = 0; i < state_->streams; ++i) {
        const double uniform = uniform_number(seed, static_cast<uint32_t>(i), static_cast<uint32_t>(position + n));
        const float* logits = state_->logits.data() + i * padded(state_->model.V);
        const int64_t token = draw_token(logits, state_->model.V, options, uniform);
        if (token < 0) return false;
        out[n * state_->streams + i] = token;
        append(i, static_cast<int32_t>(token));
      }
    }
    return true;
  });
}

}  // namespace chargpt::cpu
