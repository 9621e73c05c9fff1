// float16 on the host, converted by hand, since not every compiler has the type. See cuda_runtime.h.

#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = x.bits & 0x7fff;
  // As float32, the exponent is 2^112 times too small, which a multiplication mends, for subnormal numbers too.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  const bool finite = rest < 0x7c00;
  return std::bit_cast<float>(sign | (finite ? std::bit_cast<uint32_t>(magnitude) : 0x7f800000 | rest << 13));
}

inline __half __float2half_rn(float x) {  // to nearest, ties to even
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
  if (std::isnan(x)) return {0x7fff};
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Adding 2^(e + 13), e the exponent of x but at least -14, leaves the 11 bits that float16 has room for.
  const uint32_t exponent = std::max(std::bit_cast<uint32_t>(magnitude) >> 23, 113u);
  const float large = std::bit_cast<float>((exponent + 13) << 23);
  const float rounded = (magnitude + large) - large;
  return {static_cast<uint16_t>(sign | std::bit_cast<uint32_t>(rounded * 0x1p-112f) >> 13)};
}
inline __half __float2half(float x) { return __float2half_rn(x); }

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float22half2_rn(float2 x) { return __floats2half2_rn(x.x, x.y); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
