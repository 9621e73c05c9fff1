// Compiles the header CHARGPT_KERNEL once for each instruction set, in the namespaces plain, avx2, avx512, avx512_bf16
// and, where CHARGPT_KERNEL_FOR_AMX is defined, amx, so that one library runs on every CPU and uses what it finds there
// (best_isa, has_amx). Each time, simd.h offers vectors of that set. A kernel header has no include guard, includes nothing from the standard library itself, and
// uses no lambdas, which do not take the target of their surroundings.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only

#define CHARGPT_ISA plain
#define CHARGPT_VECTOR_BYTES 16
#define CHARGPT_ISA_LEVEL 0
#include CHARGPT_KERNEL
#undef CHARGPT_ISA
#undef CHARGPT_VECTOR_BYTES
#undef CHARGPT_ISA_LEVEL

#if defined(__x86_64__)

#define CHARGPT_ISA avx2
#define CHARGPT_VECTOR_BYTES 32
#define CHARGPT_ISA_LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include CHARGPT_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CHARGPT_ISA
#undef CHARGPT_VECTOR_BYTES
#undef CHARGPT_ISA_LEVEL

#define CHARGPT_ISA avx512
#define CHARGPT_VECTOR_BYTES 64
#define CHARGPT_ISA_LEVEL 2
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#include CHARGPT_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CHARGPT_ISA
#undef CHARGPT_VECTOR_BYTES
#undef CHARGPT_ISA_LEVEL

#define CHARGPT_ISA avx512_bf16
#define CHARGPT_VECTOR_BYTES 64
#define CHARGPT_ISA_LEVEL 3
#if defined(__clang__)
#pragma clang attribute push(                                                                           \
        __attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
        apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#include CHARGPT_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CHARGPT_ISA
#undef CHARGPT_VECTOR_BYTES
#undef CHARGPT_ISA_LEVEL

#if defined(CHARGPT_KERNEL_FOR_AMX)
#define CHARGPT_ISA amx
#define CHARGPT_VECTOR_BYTES 64
#define CHARGPT_ISA_LEVEL 4
#if defined(__clang__)
#pragma clang attribute push(                                                                                         \
        __attribute__((target("amx-bf16,amx-tile,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
        apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-bf16,amx-tile,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#endif
#include CHARGPT_KERNEL
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef CHARGPT_ISA
#undef CHARGPT_VECTOR_BYTES
#undef CHARGPT_ISA_LEVEL
#endif  // CHARGPT_KERNEL_FOR_AMX

#endif  // __x86_64__
