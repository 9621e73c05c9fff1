// What one thread, one warp or one block does with a row of logits: its sums, its loss, its gradient. The mathematics
// and the kernels are in cross_entropy.cu.

#pragma once

#include <cmath>

#include "launch.cuh"
#include "mma.cuh"
#include "reduce.cuh"
#include "row.cuh"

namespace chargpt::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int kIgnored = -2, kOutOfRange = -1;  // targets

template <class T>
struct LossProblem {
  const T* logits;  // (N, V)
  int64_t N, row_stride;
  int V;
  const int64_t* targets;  // (N)
  int64_t ignore_index;
  float smoothing, z_loss, softcap;
  const int64_t* count;     // losses are divided by this; nullptr: by nothing
  const float* upstream;    // what flows into the loss; nullptr: 1
  int64_t upstream_stride;  // from row to row
  float *losses, *maxima, *sums;  // (N)
  T* gradient;                    // (N, V); nullptr: not wanted

  __device__ const T* row(int64_t i) const { return logits + i * row_stride; }
  __device__ T* gradient_row(int64_t i) const { return gradient + i * V; }

  __device__ int target(int64_t i) const {
    const int64_t y = targets[i];
    return y == ignore_index ? kIgnored : y >= 0 && y < V ? static_cast<int>(y) : kOutOfRange;
  }
  __device__ float capped(float x) const { return softcap > 0 ? softcap * tanhf(x / softcap) : x; }
  __device__ float target_logit(int64_t i, int target) const {  // NaN makes a NaN of the loss
    return target < 0 ? NAN : capped(widen(row(i)[target]));
  }
  __device__ float scale(int64_t i) const {
    const float divided = count != nullptr ? 1.0f / static_cast<float>(max(*count, int64_t{1})) : 1.0f;
    return upstream != nullptr ? divided * upstream[i * upstream_stride] : divided;
  }
};

__device__ inline float exponential(float x) { return exp2_approx(x * kLog2e); }

// ---- The sums over a row -------------------------------------------------------------------------------------------

struct Sums {
  float maximum;  // m
  float sum;      // of exp(x - m)
  float shifted;  // of x - pivot, for label smoothing
};

// Sums of one row, and those of the next, while a slow warp still reads the first. A multiple of 16.
constexpr size_t kScratchBytes = 2 * kWarp * sizeof(Sums);

__device__ inline Sums no_sums() { return {-INFINITY, 0.0f, 0.0f}; }

// -inf - -inf would be NaN; exp(-inf - 0) is the right 0.
__device__ inline float subtrahend(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

struct Merge {
  __device__ Sums operator()(const Sums& a, const Sums& b) const {
    const float maximum = fmaxf(a.maximum, b.maximum), base = subtrahend(maximum);
    return {maximum, a.sum * exponential(a.maximum - base) + b.sum * exponential(b.maximum - base),
            a.shifted + b.shifted};
  }
};

// A finite number near the logits, or among them: subtracting it saves the digits that logits have in common.
__device__ inline float pivot_at(float target_logit) { return isfinite(target_logit) ? target_logit : 0.0f; }

template <class T, int n>
__device__ void add(Sums& sums, const LossProblem<T>& problem, float (&x)[n], float pivot) {
  if (problem.softcap > 0) {
#pragma unroll
    for (int e = 0; e < n; ++e) x[e] = problem.capped(x[e]);
  }
  float maximum = sums.maximum;
#pragma unroll
  for (int e = 0; e < n; ++e) maximum = fmaxf(maximum, x[e]);
  const float base = subtrahend(maximum);
  sums.sum *= exponential(sums.maximum - base);
  sums.maximum = maximum;
#pragma unroll
  for (int e = 0; e < n; ++e) sums.sum += exponential(x[e] - base);
  if (problem.smoothing > 0) {
#pragma unroll
    for (int e = 0; e < n; ++e) sums.shifted += x[e] - pivot;
  }
}

template <class T>
__device__ void add_chunk(Sums& sums, const LossProblem<T>& problem, const uint4& chunk, float pivot) {
  float x[kChunk<T>];
  widen<T>(chunk, x);
  add(sums, problem, x, pivot);
}
template <class T>
__device__ void add_edge(Sums& sums, const LossProblem<T>& problem, float edge, float pivot) {
  float x[1] = {edge};
  add(sums, problem, x, pivot);
}

// Writes what is kept of a row, and its loss.
template <class T>
__device__ void finish_row(const LossProblem<T>& problem, int64_t i, int target, const Sums& sums, float pivot,
                           float target_logit) {
  if (target == kIgnored) {
    problem.losses[i] = 0;
    return;
  }
  const float log_sum = logf(sums.sum), lse = sums.maximum + log_sum;
  float loss = (1 - problem.smoothing) * (log_sum + (sums.maximum - target_logit));
  if (problem.smoothing > 0) {
    const float mean = sums.shifted / static_cast<float>(problem.V) + (pivot - sums.maximum);  // of x - m
    loss += problem.smoothing * (log_sum - mean);
  }
  if (problem.z_loss > 0) loss += problem.z_loss * lse * lse;
  problem.losses[i] = loss;
  problem.maxima[i] = sums.maximum;
  problem.sums[i] = sums.sum;
}

// ---- The gradient of a row -----------------------------------------------------------------------------------------

template <class T>
struct GradientRow {
  const LossProblem<T>& problem;
  T* out;
  float maximum, softmax, everywhere;  // the gradient is exp(x - maximum) * softmax + everywhere, but at the target
  float at_target;
  int target;
  bool in_chunks;  // whether the logits' chunks are chunks here too

  __device__ GradientRow(const LossProblem<T>& problem, int64_t i, int target, float maximum, float sum,
                         float target_logit)
      : problem(problem), out(problem.gradient_row(i)), maximum(maximum), target(target) {
    const float scale = target == kOutOfRange ? NAN : problem.scale(i), lse = maximum + logf(sum);
    const float even = problem.smoothing / static_cast<float>(problem.V), z_term = 2 * problem.z_loss * lse;
    softmax = scale * (1 + z_term) / sum;
    everywhere = -scale * even;
    // What nearly cancels, p - 1, is subtracted first.
    const float p = exponential(target_logit - maximum) / sum, wanted = (1 - problem.smoothing) + even;
    at_target = scale * ((p - wanted) + z_term * p) * softcap_factor(target_logit);
    in_chunks = cut_alike(problem.row(i), out);
  }

  __device__ float softcap_factor(float x) const {
    const float t = problem.softcap > 0 ? x / problem.softcap : 0.0f;
    return 1 - t * t;
  }
  __device__ float uncapped(float x) const { return exponential(x - maximum) * softmax + everywhere; }

  // Turns logits into the gradient at them, were none the target's.
  template <int n>
  __device__ void differentiate(float (&x)[n]) const {
    if (problem.softcap > 0) {
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const float capped = problem.capped(x[e]);
        x[e] = uncapped(capped) * softcap_factor(capped);
      }
    } else {
#pragma unroll
      for (int e = 0; e < n; ++e) x[e] = uncapped(x[e]);
    }
  }

  // The element at the target is written twice, by the same thread.
  __device__ void put_chunk(int begin, const uint4& logits) const {
    float x[kChunk<T>];
    widen<T>(logits, x);
    differentiate(x);
    store(out + begin, x, in_chunks);
    if (static_cast<unsigned>(target - begin) < kChunk<T>) out[target] = narrow<T>(at_target);
  }
  __device__ void put_edge(int j, float logit) const {
    float x[1] = {logit};
    differentiate(x);
    out[j] = narrow<T>(j == target ? at_target : x[0]);
  }
};

// The gradient of an ignored row, by `lanes` threads.
template <class T>
__device__ void put_zeros(T* out, int V, int lane, int lanes) {
  const Row<T> row(out, V);
  for (int c = lane; c < row.chunks; c += lanes) store_chunk(out + row.chunk_at(c), make_uint4(0, 0, 0, 0));
  for (int e = lane; e < row.edges; e += lanes) out[row.edge_at(e)] = narrow<T>(0.0f);
}

}  // namespace chargpt::cuda
