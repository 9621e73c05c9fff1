// Compiles the header CHARGPT_KERNEL once for each instruction set, in the namespaces plain, avx2, avx512 and
// avx512_bf16, so that one library runs on every CPU and uses what it finds there (best_isa). Each time, simd.h offers
// vectors of that set. Where CHARGPT_BFLOAT16_ALONE is defined there are two more, amx and neon_bf16, which differ in
// products of bfloat16 alone (has_amx, has_neon_bf16). On arm64 `plain` is NEON: the compiler makes it of the vectors. A kernel header has no include guard, includes nothing from the standard library itself, and
// uses no lambdas, which do not take the target of their surroundings.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#define CHARGPT_BFLOAT16_DOT
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
#undef CHARGPT_BFLOAT16_DOT

#if defined(CHARGPT_BFLOAT16_ALONE)
#define CHARGPT_ISA amx
#define CHARGPT_VECTOR_BYTES 64
#define CHARGPT_ISA_LEVEL 4
#define CHARGPT_BFLOAT16_DOT
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
#undef CHARGPT_BFLOAT16_DOT
#endif  // CHARGPT_BFLOAT16_ALONE

#elif defined(CHARGPT_COMPILES_NEON_BF16) && defined(CHARGPT_BFLOAT16_ALONE)

#define CHARGPT_ISA neon_bf16
#define CHARGPT_VECTOR_BYTES 16
#define CHARGPT_ISA_LEVEL 0
#define CHARGPT_BFLOAT16_DOT
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+bf16")
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
#undef CHARGPT_BFLOAT16_DOT

#endif  // __aarch64__
