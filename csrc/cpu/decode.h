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

namespace chargpt::cpu {

// kHalf: products of bfloat16, added up in float32. So are those of attention, whose keys and values have half the bytes.
// kInt8: as that, but the matrices multiply whole numbers from -127 to 127, exactly, with one scale for each kGroup
// inputs of a weight's output and one for each kGroup inputs of a token: the largest magnitude there over 127.
enum class Precision { kFloat, kHalf, kInt8 };
enum class Norm { kNone, kLayer, kRms };
enum class Activation { kNone, kRelu, kReluSquared, kGelu, kSwiglu };

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

// The token that a number in [0, 1) chooses from logits (V), as chargpt/generation/sampler.py does; -1 if they have no
// softmax. 0 as temperature takes the likeliest.
int64_t draw_token(const float* logits, int64_t V, const DrawOptions& options, double uniform);

// The number in [0, 1) of sample and position: Philox with the counter (position, sample, 0, 1).
double uniform_number(uint64_t seed, uint32_t sample, uint32_t position);

// Whether each thread takes streams of its own and waits for no other; the alternative shares the work on each stream.
inline bool apart(int64_t streams, int threads) { return streams % threads == 0 || streams >= 4 * threads; }

class Decoder {
 public:
  Decoder(DecodeModel model, int64_t streams, int most_threads);  // the model's pointers must outlive it
  ~Decoder();

  int64_t streams() const;
  int most_threads() const;
  const DecodeModel& model() const;

  // Forget all, and begin stream i with `windows[i]`: at least one token each, at most block_size.
  void begin(std::vector<std::vector<int32_t>> windows);

  // Read what no stream has read yet. Where a window is longer than block_size, its stream goes on with the last `keep`
  // tokens of it (1 to block_size), from position 0. Afterwards logits() is (streams, padded(V)).
  void read(int64_t keep, int threads);
  const float* logits() const;

  void append(int64_t stream, int32_t token);

  // `count` times: read, draw, append. out: (count, streams), and logprobs, those of the tokens by the logits alone. The
  // first draw has the number of `position`. False if logits had no softmax.
  bool generate(int64_t count, int64_t position, uint64_t seed, int64_t keep, const DrawOptions& options, int threads,
                int64_t* out, float* logprobs);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace chargpt::cpu
