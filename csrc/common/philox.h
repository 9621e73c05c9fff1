// The constants of Philox 4x32 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", table 2), from which
// dropout's random halves of words come: chargpt/kernels/philox.py has the rule.

#pragma once

#include <cstdint>

namespace chargpt {

inline constexpr int kPhiloxRounds = 7;
inline constexpr uint32_t kPhiloxFactor0 = 0xD2511F53, kPhiloxFactor1 = 0xCD9E8D57;
inline constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9, kPhiloxKeyStep1 = 0xBB67AE85;
inline constexpr double kDropoutUnit = 65536;  // a weight is dropped where its 16 bits are less than p times this

}  // namespace chargpt
