// torch's threads, as cpu/parallel.h asks for them.

#pragma once

#include <ATen/Parallel.h>

#include "../cpu/parallel.h"

namespace chargpt::bindings {

inline void parallel_for(int64_t count, cpu::Items body, void* context) {
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace chargpt::bindings
