// A decoder's state: what its streams hold, and the threads that run its passes. decode_kernel.h has the arithmetic,
// decode_draw.h the drawing.

#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <thread>
#include <utility>

#include "block.h"  // kRmsEps
#include "decode_draw.h"
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
  int64_t count;        // at most kPassRows
  float *x, *attended;  // count rows of x_stride
  int64_t x_stride;
  float* qkv;
  int64_t qkv_stride;
  float* hidden;
  int64_t hidden_stride;
  float* logits;  // one row for each reading that is the last of its stream, padded(V) wide
  float* lse;     // of each of these rows

  // Of each thread: a row of x_stride; kPassRows rows of a matrix's inputs, with the scales of their groups; and for one
  // head a query and what is mixed, padded(D), and scores and their weights, padded(block_size).
  float* normed;
  uint32_t* words;
  int64_t words_stride;
  float* scale;
  int32_t* offset;
  int64_t groups;
  uint32_t *query, *shares;
  float *mixed, *scores;

  uint32_t* cache;
  int64_t layers, heads, head_words;  // head_words: of keys and values of one head of one layer of one stream
  int64_t key_words;                  // of these, the keys, which come first

  uint32_t* keys(int64_t stream, int64_t layer, int64_t head) const {
    return cache + ((stream * layers + layer) * heads + head) * head_words;
  }
  uint32_t* values(int64_t stream, int64_t layer, int64_t head) const { return keys(stream, layer, head) + key_words; }
};

struct DecodeKernels {
  void (*run_pass)(const DecodeModel&, const DecodePass&, Barrier&, int thread, int threads);
};

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

uint32_t half_of(float x) {  // bfloat16, to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  return x == x ? (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

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

}  // namespace

Linear::Linear(const float* from, const float* b, int64_t N, int64_t K, Precision precision)
    : N(N), K(K), precision(precision), weight(padded(N) * words()), bias(padded(N)) {
  const int64_t groups = (K + kGroup - 1) / kGroup;
  if (precision == Precision::kInt8) {
    std::fill(weight.begin(), weight.end(), 0x80808080);
    scale.resize(padded(N) * groups);
  }
  for (int64_t n = 0; n < N; ++n) {
    uint32_t* column = weight.data() + n / kPanel * words() * kPanel + n % kPanel;
    const float* row = from + n * K;
    if (precision == Precision::kFloat) {
      for (int64_t k = 0; k < K; ++k) column[k * kPanel] = bits_of(row[k]);
    } else if (precision == Precision::kHalf) {
      for (int64_t k = 0; k < K; ++k) column[k / 2 * kPanel] |= half_of(row[k]) << (k % 2 * 16);
    } else {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = std::min(K, (g + 1) * kGroup);
        float top = 0, poison = 0;  // NaN, if there is a NaN or an infinity
        for (int64_t k = g * kGroup; k < end; ++k) {
          top = std::max(top, std::fabs(row[k]));
          poison += row[k] * 0;
        }
        scale[(n / kPanel * groups + g) * kPanel + n % kPanel] = top / 127 + poison;
        if (top < 1e-30f || poison != 0) continue;
        for (int64_t k = g * kGroup; k < end; ++k) {
          const auto whole = static_cast<uint32_t>(static_cast<int32_t>(std::nearbyint(row[k] * (127 / top))) + 128);
          uint32_t& word = column[k / 4 * kPanel];
          word = (word & ~(0xFFu << (k % 4 * 8))) | whole << (k % 4 * 8);
        }
      }
    }
  }
  if (b != nullptr) std::copy(b, b + N, bias.begin());
}

// -------------------------------------------------------------------------------------------------------------- streams

// What the threads that go through passes together need: some of the streams, and memory.
struct Crew {
  Aligned<float> x, attended, qkv, hidden, normed, scale, mixed, scores;
  Aligned<uint32_t> words, query, shares;
  Aligned<int32_t> offset;
  std::vector<Reading> readings;
  DecodePass pass;
  int64_t begin = 0, end = 0;    // of the running streams
  std::vector<int64_t> first_of;  // for each of them the one that reads the same window for it, or itself
  std::vector<char> from_nothing;  // whether it has read nothing yet

  Crew(const DecodeModel& model, int threads, Aligned<uint32_t>& cache) {
    const int64_t D = model.D, slots = padded(model.block_size), stride = padded(model.C);
    const int64_t qkv_stride = padded((model.H + 2 * model.H_kv) * D);
    const int64_t hidden_stride = padded(model.hidden * (model.activation == Activation::kSwiglu ? 2 : 1));
    const int64_t widest = std::max(model.C, model.hidden), groups = (widest + kGroup - 1) / kGroup;
    const auto room = [](auto& memory, int64_t count) {
      memory.resize(count);
      return memory.data();
    };
    pass = {.readings = nullptr,
            .count = 0,
            .x = room(x, kPassRows * stride),
            .attended = room(attended, kPassRows * stride),
            .x_stride = stride,
            .qkv = room(qkv, kPassRows * qkv_stride),
            .qkv_stride = qkv_stride,
            .hidden = room(hidden, kPassRows * hidden_stride),
            .hidden_stride = hidden_stride,
            .logits = nullptr,
            .lse = nullptr,
            .normed = room(normed, threads * stride),
            .words = room(words, threads * kPassRows * padded(widest)),
            .words_stride = padded(widest),
            .scale = room(scale, threads * kPassRows * groups),
            .offset = room(offset, threads * kPassRows * groups),
            .groups = groups,
            .query = room(query, threads * padded(D)),
            .shares = room(shares, threads * slots),
            .mixed = room(mixed, threads * padded(D)),
            .scores = room(scores, threads * slots),
            .cache = cache.data(),
            .layers = static_cast<int64_t>(model.layers.size()),
            .heads = model.H_kv,
            .head_words = head_words(model),
            .key_words = key_words(model)};
  }

  // Of one head of one layer of one stream. In bfloat16 a word holds two channels of a key, or of a value two positions.
  static int64_t key_words(const DecodeModel& model) {
    return padded(model.block_size) * (model.precision == Precision::kFloat ? model.D : (model.D + 1) / 2);
  }
  static int64_t head_words(const DecodeModel& model) {
    const int64_t rows = padded(model.block_size) / (model.precision == Precision::kFloat ? 1 : 2);
    return key_words(model) + rows * padded(model.D);
  }
};

struct Stream {
  std::vector<int32_t> window;  // what it sees, and tokens that it has not read yet
  int64_t cached = 0;           // how many of them it has read
  StreamOptions options;
  uint32_t position = 0;  // of the next draw
};

struct Decoder::State {
  const DecodeModel model;
  const int most_threads;
  std::vector<Stream> streams;   // of each slot
  std::vector<int64_t> running;  // slots
  Aligned<float> logits, lse;    // of the running ones
  Aligned<uint32_t> cache;
  std::vector<Crew> crews;

  State(DecodeModel given, int64_t slots, int most_threads)
      : model(std::move(given)), most_threads(most_threads), streams(slots) {
    logits.resize(slots * padded(model.V));
    lse.resize(slots);
    cache.resize(slots * static_cast<int64_t>(model.layers.size()) * model.H_kv * Crew::head_words(model));
    const int64_t count = std::min<int64_t>(slots, most_threads);
    crews.reserve(count);
    for (int64_t i = 0; i < count; ++i) crews.emplace_back(model, i == 0 ? most_threads : 1, cache);
  }

  Stream& stream(int64_t i) { return streams[running[i]]; }
  void collect(Crew& crew);
  template <class Run>
  void read(Crew& crew, const Run& run);
  template <class Step>
  bool together(int threads, Step step);
};

// What none of the crew's streams has read yet, stream after stream. Where two have read nothing of the same window, one
// reads it.
void Decoder::State::collect(Crew& crew) {
  crew.readings.clear();
  crew.first_of.clear();
  crew.from_nothing.clear();
  for (int64_t i = crew.begin; i < crew.end; ++i) {
    Stream& here = stream(i);
    if (static_cast<int64_t>(here.window.size()) > model.block_size) {
      here.window.erase(here.window.begin(), here.window.end() - here.options.keep);
      here.cached = 0;
    }
    int64_t first = i;
    for (int64_t j = crew.begin; here.cached == 0 && j < i && first == i; ++j) {
      const bool reads = crew.first_of[j - crew.begin] == j && crew.from_nothing[j - crew.begin];
      if (reads && stream(j).window == here.window) first = j;
    }
    crew.first_of.push_back(first);
    crew.from_nothing.push_back(here.cached == 0);
    const int64_t size = static_cast<int64_t>(here.window.size());
    for (int64_t t = here.cached; t < size && first == i; ++t) {
      crew.readings.push_back({running[i], t, here.window[t], here.window[t == 0 ? 0 : t - 1], t == size - 1});
    }
    here.cached = size;
  }
}

template <class Run>
void Decoder::State::read(Crew& crew, const Run& run) {
  collect(crew);
  run();
  // The rows of those that read stand at the crew's first places; from the last on, each goes to its own.
  const int64_t width = padded(model.V);
  int64_t row = crew.begin;
  for (int64_t i = crew.begin; i < crew.end; ++i) row += crew.first_of[i - crew.begin] == i;
  for (int64_t i = crew.end - 1; i >= crew.begin; --i) {
    if (crew.first_of[i - crew.begin] != i || --row == i) continue;
    std::copy_n(logits.data() + row * width, width, logits.data() + i * width);
    lse[i] = lse[row];
  }
  const DecodePass& pass = crew.pass;
  for (int64_t i = crew.begin; i < crew.end; ++i) {
    const int64_t first = crew.first_of[i - crew.begin], T = stream(i).cached;
    if (first == i) continue;
    const int64_t keys = padded(T) * (pass.key_words / padded(model.block_size));
    const int64_t values = (model.precision == Precision::kFloat ? T : (T + 1) / 2) * padded(model.D);
    for (int64_t layer = 0; layer < pass.layers; ++layer) {
      for (int64_t head = 0; head < pass.heads; ++head) {
        std::copy_n(pass.keys(running[first], layer, head), keys, pass.keys(running[i], layer, head));
        std::copy_n(pass.values(running[first], layer, head), values, pass.values(running[i], layer, head));
      }
    }
    std::copy_n(logits.data() + first * width, width, logits.data() + i * width);
    lse[i] = lse[first];
  }
}

// Runs `step(crew, run)`, which calls `run` for passes over all of the crew's readings as often as it likes: for one
// crew of all threads, or, where there are streams enough, for crews of one thread, which wait for nobody. The other
// threads live as long as that, and no longer. Whether all steps were true.
template <class Step>
bool Decoder::State::together(int threads, Step step) {
  const int64_t streams = static_cast<int64_t>(running.size());
  const int count = apart(streams, threads) ? threads : 1, each = threads / count;
  const auto run_pass = kernels().run_pass;
  std::vector<std::exception_ptr> problems(count);
  std::atomic<bool> all{true};
  std::atomic<int> start{0};  // 1: go, -1: do not
  Barrier barrier(each);
  bool done = false;
  const auto lead = [&](int number) {
    Crew& crew = crews[number];
    crew.begin = streams * number / count;
    crew.end = streams * (number + 1) / count;
    try {
      const bool result = step(crew, [&] {
        int64_t finished = crew.begin;
        const int64_t size = static_cast<int64_t>(crew.readings.size());
        for (int64_t begin = 0; begin < size; begin += kPassRows) {
          crew.pass.readings = crew.readings.data() + begin;
          crew.pass.count = std::min<int64_t>(kPassRows, size - begin);
          crew.pass.logits = logits.data() + finished * padded(model.V);
          crew.pass.lse = lse.data() + finished;
          for (int64_t r = 0; r < crew.pass.count; ++r) finished += crew.pass.readings[r].last;
          barrier.wait();
          run_pass(model, crew.pass, barrier, 0, each);
        }
      });
      if (!result) all = false;
    } catch (...) {  // no memory for a window
      problems[number] = std::current_exception();
    }
    if (each > 1) {
      done = true;
      barrier.wait();
    }
  };
  const auto work = [&](int thread) {
    while (start == 0) std::this_thread::yield();
    if (start < 0) return;
    if (count > 1) return lead(thread);
    for (;;) {
      barrier.wait();  // until there is a pass, or no more
      if (done) return;
      run_pass(model, crews[0].pass, barrier, thread, each);
    }
  };
  std::vector<std::thread> others;
  const auto join = [&] {
    for (std::thread& other : others) other.join();
  };
  try {
    for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  } catch (...) {  // the system has no more threads
    start = -1;
    join();
    throw;
  }
  start = 1;
  lead(0);
  join();
  for (const std::exception_ptr& problem : problems) {
    if (problem) std::rethrow_exception(problem);
  }
  return all;
}

Decoder::Decoder(DecodeModel model, int64_t slots, int most_threads)
    : state_(std::make_unique<State>(std::move(model), slots, most_threads)) {}
Decoder::~Decoder() = default;

int64_t Decoder::slots() const { return static_cast<int64_t>(state_->streams.size()); }
int Decoder::most_threads() const { return state_->most_threads; }
const DecodeModel& Decoder::model() const { return state_->model; }
const std::vector<int64_t>& Decoder::running() const { return state_->running; }

bool Decoder::has_unread(int64_t slot) const {
  const Stream& stream = state_->streams[slot];
  return stream.cached < static_cast<int64_t>(stream.window.size());
}

void Decoder::begin(int64_t slot, std::vector<int32_t> window, StreamOptions options) {
  end(slot);
  state_->streams[slot] = {.window = std::move(window), .options = std::move(options)};
  auto& running = state_->running;
  running.insert(std::lower_bound(running.begin(), running.end(), slot), slot);
}

void Decoder::end(int64_t slot) { std::erase(state_->running, slot); }

void Decoder::read(int threads) {
  state_->together(threads, [this](Crew& crew, const auto& run) {
    state_->read(crew, run);
    return true;
  });
}

const float* Decoder::logits() const { return state_->logits.data(); }

void Decoder::append(int64_t slot, int32_t token) { state_->streams[slot].window.push_back(token); }

bool Decoder::generate(int64_t count, int threads, int64_t* out, float* logprobs, float* all) {
  const int64_t V = state_->model.V, streams = static_cast<int64_t>(state_->running.size());
  return state_->together(threads, [=, this](Crew& crew, const auto& run) {
    for (int64_t n = 0; n < count; ++n) {
      state_->read(crew, run);
      for (int64_t i = crew.begin; i < crew.end; ++i) {
        Stream& stream = state_->stream(i);
        const float* logits = state_->logits.data() + i * padded(V);
        if (all != nullptr) std::copy_n(logits, V, all + (n * streams + i) * V);
        DrawOptions draw = stream.options.draw;
        draw.bias = stream.options.bias.empty() ? nullptr : stream.options.bias.data();
        const double uniform = uniform_number(stream.options.seed, stream.options.sample, stream.position++);
        const int64_t token = draw_token(logits, V, draw, uniform);
        if (token < 0) return false;
        out[n * streams + i] = token;
        logprobs[n * streams + i] = logits[token] - state_->lse[i];
        stream.window.push_back(static_cast<int32_t>(token));
      }
    }
    return true;
  });
}

}  // namespace chargpt::cpu
