// The constants of Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2), from which
// dropout's random words come: chargpt/kernels/philox.py has the rule.

#pragma once

#include <cstdint>

namespace chargpt {

inline constexpr int kPhiloxRounds = 10;
inline constexpr uint32_t kPhiloxFactor0 = 0xD2511F53, kPhiloxFactor1 = 0xCD9E8D57;
inline constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;

}  // namespace chargpt
