// A Transformer that reads and writes token by token on a CPU: what a caller needs to know. Torch-free; decode.cpp
// implements it. The mathematics are those of chargpt/models/transformer.py in float32. A token reads every weight once,
// so their bytes decide its time: at a lower Precision the matrices and what they multiply have fewer.
//
// The bits of a stream's logits depend on the stream alone: not on the number of threads, nor on other streams, nor on
// how many tokens were read together.

#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "parts.h"

namespace chargpt::cpu {

// kHalf: products of bfloat16, added up in float32. So are those of attention, whose keys and values have half the bytes.
// kInt8: as that, but the matrices multiply whole numbers from -127 to 127, exactly, with one scale for each kGroup
// inputs of a weight's output and one for each kGroup inputs of a token: the largest magnitude there over 127.
enum class Precision { kFloat, kHalf, kInt8 };

inline constexpr int64_t kPanel = 16;  // outputs of a matrix that lie side by side, for vectors of any length up to that
inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

inline constexpr int64_t kGroup = 64;  // inputs that share a scale; divides by 4

// A vector's memory begins with a cache line, so that no load straddles two.
template <class T>
struct CacheAligned {
  using value_type = T;
  CacheAligned() = default;
  template <class U>
  CacheAligned(const CacheAligned<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const CacheAligned&) const { return true; }
};
template <class T>
using Aligned = std::vector<T, CacheAligned<T>>;

// y = W x + b. The weights of 16 outputs lie together. kFloat: those of one input after those of the other. kHalf: for
// each pair of inputs 16 words, the first in the lower halves. kInt8: for each four inputs 16 words of bytes, which hold
// the number plus 128. Nothing (0, in kInt8 128) stands where N or K ends.
struct Linear {
  int64_t N = 0, K = 0;
  Precision precision = Precision::kFloat;
  Aligned<uint32_t> weight;
  Aligned<float> scale;  // kInt8: of 16 outputs for each group of inputs
  Aligned<float> bias;   // padded(N)

  Linear() = default;
  // weight (N, K), bias (N) or nullptr
  Linear(const float* weight, const float* bias, int64_t N, int64_t K, Precision precision);

  int64_t words() const {  // of an input, or of one panel over its 16 outputs
    if (precision == Precision::kInt8) return (K + kGroup - 1) / kGroup * (kGroup / 4);
    return precision == Precision::kHalf ? (K + 3) / 4 * 2 : (K + 1) / 2 * 2;
  }
};

struct Gain {  // of LayerNorm; nullptr: 1 and 0
  const float *weight = nullptr, *bias = nullptr;
};

struct DecodeLayer {
  Gain attention_norm, mlp_norm;
  Linear qkv, projection, expand, contract;   // the last two with Activation other than kNone
  const float* value_embedding = nullptr;     // (V, H_kv D); nullptr: none
};

struct DecodeModel {
  Precision precision;  // of all matrices
  int64_t V, block_size, C, H, H_kv, D, hidden;
  Norm norm;
  Activation activation;
  bool qk_norm;
  float softcap;                       // 0: none
  const float* token_embedding;        // (V, C)
  const float* bigram_embedding;       // (bigram_rows, C); nullptr: none, as below
  int64_t bigram_rows;
  const float* position_embedding;     // (block_size, C)
  const float *cos, *sin;              // (block_size, D / 2)
  std::vector<DecodeLayer> layers;
  Gain last_norm;
  Linear head;
};

struct DrawOptions {
  double temperature = 1;
  int64_t top_k = 0;  // 0: all
  double top_p = 1, min_p = 0;
  const float* bias = nullptr;  // (V) added to the logits first
};

// Whether each thread takes streams of its own and waits for no other; the alternative shares the work on each one.
inline bool apart(int64_t streams, int threads) { return streams % threads == 0 || streams >= 4 * threads; }

// How a stream goes on. `sample` and the number of its draws so far choose the random numbers.
struct StreamOptions {
  DrawOptions draw;         // its bias is not used, but
  std::vector<float> bias;  // (V), or empty
  uint64_t seed = 0;
  uint32_t sample = 0;
  int64_t keep = 1;  // tokens of a full window with which it goes on, from position 0: 1 to block_size
};

// Streams come and go, each in a slot of its own.
class Decoder {
 public:
  Decoder(DecodeModel model, int64_t slots, int most_threads);  // the model's pointers must outlive it
  ~Decoder();

  int64_t slots() const;
  int most_threads() const;
  const DecodeModel& model() const;
  const std::vector<int64_t>& running() const;  // the slots of all streams, in ascending order
  bool has_unread(int64_t slot) const;

  // Begin a stream with a window of 1 to block_size tokens, in place of what ran in the slot.
  void begin(int64_t slot, std::vector<int32_t> window, StreamOptions options);
  void end(int64_t slot);

  // Read what no stream has read yet. Afterwards logits() is (running, padded(V)).
  void read(int threads);
  const float* logits() const;

  void append(int64_t slot, int32_t token);

  // `count` times: read, draw, append. out: (count, running); logprobs: those of the tokens by the logits alone; all:
  // nullptr, or room for the logits (count, running, V). False if logits had no softmax.
  bool generate(int64_t count, int threads, int64_t* out, float* logprobs, float* all);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace chargpt::cpu
