// Which of the instruction sets that foreach_isa.h compiles for this process uses.

#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__aarch64__) && !(defined(__clang__) && __clang_major__ < 16)
#define CHARGPT_COMPILES_NEON_BF16  // an older clang knows the type only where the whole file may use it
#endif

namespace chargpt::cpu {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

// The best that this CPU and its operating system offer, or a lower one named in CHARGPT_CPU_ISA. Found once.
inline Isa best_isa() {
  static const Isa chosen = [] {
    Isa best = Isa::kPlain;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::kAvx2;
    if (best == Isa::kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
      const bool both = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");  // as all have
      best = both ? Isa::kAvx512Bf16 : Isa::kAvx512;
    }
#endif
    if (const char* asked = std::getenv("CHARGPT_CPU_ISA")) {
      for (Isa isa : {Isa::kPlain, Isa::kAvx2, Isa::kAvx512}) {
        if (isa < best && std::strcmp(asked, isa_name(isa)) == 0) best = isa;
      }
    }
    return best;
  }();
  return chosen;
}

// Whether the CPU multiplies tiles of bfloat16 (Intel's AMX) and the operating system lets this process do so; unless
// CHARGPT_CPU_ISA names another set. Linux wants to be asked once, because a thread's state grows by 8 KiB
// (Documentation/arch/x86/xstate.rst).
inline bool has_amx() {
  static const bool found = [] {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24;  // of CPUID leaf 7, EDX
    constexpr int kAskPermission = 0x1023, kTileData = 18;       // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned eax, ebx, ecx, edx;
    const char* asked = std::getenv("CHARGPT_CPU_ISA");
    return best_isa() == Isa::kAvx512Bf16 && (asked == nullptr || std::strcmp(asked, "avx512_bf16") != 0) &&
           __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBFloat16) && (edx & kTiles) &&
           syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
    return false;
#endif
  }();
  return found;
}

// Whether an arm64 CPU has dot products of bfloat16 (FEAT_BF16); unless CHARGPT_CPU_ISA=plain.
inline bool has_neon_bf16() {
  static const bool found = [] {
    const char* asked = std::getenv("CHARGPT_CPU_ISA");
    if (asked != nullptr && std::strcmp(asked, "plain") == 0) return false;
#if defined(CHARGPT_COMPILES_NEON_BF16) && defined(__linux__)
    constexpr unsigned long kBFloat16 = 1ul << 14;  // HWCAP2_BF16
    return (getauxval(AT_HWCAP2) & kBFloat16) != 0;
#elif defined(CHARGPT_COMPILES_NEON_BF16) && defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
    return false;
#endif
  }();
  return found;
}

}  // namespace chargpt::cpu
