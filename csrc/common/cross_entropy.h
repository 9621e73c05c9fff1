// Softmax cross-entropy as every device's kernels are asked for it. The mathematics are in
// chargpt/kernels/ops/cross_entropy.py.

#pragma once

#include <cstdint>

namespace chargpt {

struct CrossEntropyOptions {
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;  // in [0, 1]
  double z_loss = 0.0;           // >= 0
  double softcap = 0.0;          // > 0; 0: none
};

enum class Reduction { kNone, kSum, kMean };  // the mean is over the rows that are not ignored; over no row it is 0

}  // namespace chargpt
