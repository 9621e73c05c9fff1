// Softmax cross-entropy on the CPU, loss and gradient: what a caller needs to know. Torch-free; cross_entropy.cpp
// implements it. The mathematics are those of chargpt/kernels/ops/cross_entropy.py.

#pragma once

#include <cstdint>

#include "../common/cross_entropy.h"

namespace chargpt::cpu {

struct BFloat16 {
  uint16_t bits;  // the upper half of a float32
};

template <class T>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class T>
using ComputeType = typename ComputeTypeOf<T>::type;  // of losses and of all arithmetic

// N rows of V logits. T is float, double or BFloat16. Pointers need the alignment of their element only.
template <class T>
struct CrossEntropy {
  using Real = ComputeType<T>;

  const T* logits;         // (N, V), V >= 1, each row contiguous
  int64_t V, row_stride;   // row_stride: elements from row to row
  const int64_t* targets;  // (N), in [0, V) or ignore_index: see check_targets
  CrossEntropyOptions options;
  Real* maxima;  // (N): m = the largest logit of the row after softcap; unset for ignored rows
  Real* sums;    // (N): the sum of exp(x - m), so that lse = m + log(sum); unset for ignored rows
  T* gradient;   // (N, V) contiguous; nullptr: none is wanted. May be the contiguous logits; must not overlap them else
  bool stream;   // write the gradient around the caches: it is larger than they are, and nobody reads it soon
};

// Fills maxima, sums and losses (N), and the gradient of scale * (sum of the losses) if problem.gradient is set, for
// the rows [begin, end). A row's result does not depend on the range it is in.
template <class T>
void cross_entropy_forward(const CrossEntropy<T>& problem, ComputeType<T> scale, ComputeType<T>* losses, int64_t begin,
                           int64_t end);

// Fills the gradient of the rows [begin, end) from maxima and sums. The losses' gradient is scale * weights[row], or
// scale for all rows where weights is nullptr.
template <class T>
void cross_entropy_backward(const CrossEntropy<T>& problem, ComputeType<T> scale, const ComputeType<T>* weights,
                            int64_t begin, int64_t end);

// The number of targets that are not ignored, or -1 when one is neither ignore_index nor in [0, V).
int64_t check_targets(const int64_t* targets, int64_t N, int64_t V, int64_t ignore_index);

// Sum of N losses in float64, in an order that depends on N alone.
template <class Real>
double sum_losses(const Real* losses, int64_t N);

// The code path that float32 and BFloat16 take on this CPU: "avx512_bf16", "avx512", "avx2" or "plain" (see isa.h).
const char* cross_entropy_isa();

}  // namespace chargpt::cpu
