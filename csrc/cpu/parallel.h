// How a kernel's work is spread over threads, which it leaves to the caller.

#pragma once

#include <cstdint>

namespace chargpt::cpu {

// Calls body(context, begin, end) for ranges that cover [0, count) once, at the same time or not, and returns when all
// are done. Results do not depend on the ranges. The binding gives at::parallel_for with a grain size of 1; nullptr
// means one call on this thread. `body` does not throw.
using ParallelFor = void (*)(int64_t count, void (*body)(void* context, int64_t begin, int64_t end), void* context);

using Items = void (*)(void* context, int64_t begin, int64_t end);

inline void run(ParallelFor parallel_for, int64_t count, Items items, void* context) {
  if (count == 0) return;
  if (parallel_for == nullptr) {
    items(context, 0, count);
  } else {
    parallel_for(count, items, context);
  }
}

}  // namespace chargpt::cpu
