// Vectors of float, double, bfloat16 and integers for one instruction set: included by kernel headers that foreach_isa.h
// compiles. Arithmetic is the compiler's own on vector types (+, *, <, ?:); only what it cannot express is spelt out.

namespace chargpt::cpu::CHARGPT_ISA {

#define CHARGPT_INLINE [[gnu::always_inline]] inline

#if CHARGPT_ISA_LEVEL >= 1 || defined(__aarch64__)
inline constexpr bool kFuses = true;  // a * b + c is rounded once
#else
inline constexpr bool kFuses = false;
#endif

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(CHARGPT_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
inline constexpr int kLanes = CHARGPT_VECTOR_BYTES / sizeof(T);

template <class T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;  // what a comparison of Vec<T> yields

template <class T>
CHARGPT_INLINE Vec<T> load(const void* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
CHARGPT_INLINE void store(void* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

template <class T>
CHARGPT_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // x - 0 is x, bit for bit; the compiler sees a broadcast
}

// 0, 1, 2, … in the integer type of T's comparisons
template <class T, size_t... I>
CHARGPT_INLINE Vec<IntOf<T>> iota(std::index_sequence<I...>) {
  return Vec<IntOf<T>>{static_cast<IntOf<T>>(I)...};
}
template <class T>
CHARGPT_INLINE Vec<IntOf<T>> iota() {
  return iota<T>(std::make_index_sequence<kLanes<T>>());
}

// The first n < kLanes elements, and zeros. Touches no memory behind them.
template <class T>
CHARGPT_INLINE Vec<T> load_first(const void* p, int n) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64((1u << n) - 1, p);
#elif CHARGPT_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm256_maskload_epi32((const int*)p, (__m256i)(iota<float>() < n));
  }
#endif
  Vec<T> v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
CHARGPT_INLINE void store_first(void* p, Vec<T> v, int n) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_epi32(p, (1u << n) - 1, (__m512i)v);
  if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(p, (1u << n) - 1, (__m512i)v);
#elif CHARGPT_ISA_LEVEL == 1
  if constexpr (sizeof(T) == 4) return _mm256_maskstore_epi32((int*)p, (__m256i)(iota<float>() < n), (__m256i)v);
#endif
  __builtin_memcpy(p, &v, n * sizeof(T));
}

template <class T>
CHARGPT_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (std::is_same_v<T, int32_t>) return (Vec<T>)_mm512_max_epi32((__m512i)a, (__m512i)b);
#endif
  return a > b ? a : b;
}

template <class T>
CHARGPT_INLINE T sum_of(Vec<T> v) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (std::is_same_v<T, int32_t>) return _mm512_reduce_add_epi32((__m512i)v);
#endif
  T total = v[0];
  for (int i = 1; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
CHARGPT_INLINE T maximum_of(Vec<T> v) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_ps((__m512)v);
  if constexpr (std::is_same_v<T, int32_t>) return _mm512_reduce_max_epi32((__m512i)v);
#endif
  T top = v[0];
  for (int i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

// What follows is for floats, and for kernels that begin at AVX2.
#if CHARGPT_ISA_LEVEL >= 1

CHARGPT_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {  // a b + c, rounded once
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

// The same, rounded: keeps the compiler from contracting a product and what follows into one fused operation.
CHARGPT_INLINE Vec<float> rounded(Vec<float> x) {
  asm("" : "+v"(x));
  return x;
}

CHARGPT_INLINE Vec<float> keep_first(Vec<float> x, int n, Vec<float> others) {
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_mask_mov_ps((__m512)others, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
#else
  return iota<float>() < n ? x : others;
#endif
}

CHARGPT_INLINE Vec<float> magnitude(Vec<float> x) { return (Vec<float>)((Vec<int32_t>)x & 0x7fffffff); }
CHARGPT_INLINE Vec<float> with_sign(Vec<float> x, Vec<float> sign) {  // x ≥ 0
  return (Vec<float>)((Vec<int32_t>)x | ((Vec<int32_t>)sign & static_cast<int32_t>(0x80000000)));
}

// t minus the nearest integer; 0 at -infinity.
CHARGPT_INLINE Vec<float> fraction(Vec<float> t) {
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  t = maximum<float>(broadcast(-1000.0f), t);  // -inf - -inf would be NaN. The order of the arguments lets a NaN pass
  return t - (Vec<float>)_mm256_round_ps((__m256)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
}

// p 2^(t - f) for f = fraction(t) and p ≥ 1/2; t = -infinity gives 0, and powers that are no normal numbers may.
CHARGPT_INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> t, Vec<float> f) {
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
#else
  const Vec<float> n = maximum<float>(broadcast(-1000.0f), t) - f;
  const Vec<uint32_t> exponent = (Vec<uint32_t>)_mm256_cvtps_epi32((__m256)n) << 23;
  const Vec<float> scaled = (Vec<float>)((Vec<uint32_t>)p + exponent);
  const Vec<float> result = n < -125.0f ? broadcast(0.0f) : scaled;  // n ≥ -125 keeps it normal
  return p == p ? result : p;  // a NaN stays
#endif
}

// x = 2^exponent mantissa with mantissa in [0.75, 1.5), for x > 0 and normal.
CHARGPT_INLINE void split(Vec<float> x, Vec<float>* exponent, Vec<float>* mantissa) {
#if CHARGPT_ISA_LEVEL >= 2
  *mantissa = (Vec<float>)_mm512_getmant_ps((__m512)x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  *exponent = (Vec<float>)_mm512_getexp_ps((__m512)(x / *mantissa));
#else
  const Vec<int32_t> bits = (Vec<int32_t>)x, power = (bits - 0x3f400000) >> 23;  // 0.75
  *exponent = __builtin_convertvector(power, Vec<float>);
  *mantissa = (Vec<float>)((Vec<uint32_t>)bits - ((Vec<uint32_t>)power << 23));
#endif
}

// Two vectors past the caches, in whole cache lines: p is aligned to one. After the last, fence().
CHARGPT_INLINE void stream(float* p, Vec<float> a, Vec<float> b) {
#if CHARGPT_ISA_LEVEL >= 2
  _mm512_stream_ps(p, (__m512)a);
  _mm512_stream_ps(p + 16, (__m512)b);
#else
  _mm256_stream_ps(p, (__m256)a);
  _mm256_stream_ps(p + 8, (__m256)b);
#endif
}
CHARGPT_INLINE void fence() { _mm_sfence(); }

// rows[r] holds the partial results of row r; lane r of what is returned holds their combination: a transposition in
// which every exchange halves what is left. Interleaving combines the quarters of 128 bits, then the quarters meet.
template <class Combine>
CHARGPT_INLINE Vec<float> combine_lanes(const Vec<float>* rows, Combine combine) {
  constexpr int kQuarters = kLanes<float> / 4;
  Vec<float> quads[kQuarters];
  for (int q = 0; q < kQuarters; ++q) {
    const Vec<float>* r = rows + 4 * q;
#if CHARGPT_ISA_LEVEL >= 2
    const __m512 r0 = (__m512)r[0], r1 = (__m512)r[1], r2 = (__m512)r[2], r3 = (__m512)r[3];
    const Vec<float> ab = combine((Vec<float>)_mm512_unpacklo_ps(r0, r1), (Vec<float>)_mm512_unpackhi_ps(r0, r1));
    const Vec<float> cd = combine((Vec<float>)_mm512_unpacklo_ps(r2, r3), (Vec<float>)_mm512_unpackhi_ps(r2, r3));
    quads[q] = combine((Vec<float>)_mm512_unpacklo_pd((__m512d)ab, (__m512d)cd),
                       (Vec<float>)_mm512_unpackhi_pd((__m512d)ab, (__m512d)cd));
#else
    const __m256 r0 = (__m256)r[0], r1 = (__m256)r[1], r2 = (__m256)r[2], r3 = (__m256)r[3];
    const Vec<float> ab = combine((Vec<float>)_mm256_unpacklo_ps(r0, r1), (Vec<float>)_mm256_unpackhi_ps(r0, r1));
    const Vec<float> cd = combine((Vec<float>)_mm256_unpacklo_ps(r2, r3), (Vec<float>)_mm256_unpackhi_ps(r2, r3));
    quads[q] = combine((Vec<float>)_mm256_unpacklo_pd((__m256d)ab, (__m256d)cd),
                       (Vec<float>)_mm256_unpackhi_pd((__m256d)ab, (__m256d)cd));
#endif
  }
#if CHARGPT_ISA_LEVEL >= 2
  const __m512 q0 = (__m512)quads[0], q1 = (__m512)quads[1], q2 = (__m512)quads[2], q3 = (__m512)quads[3];
  const __m512 low = (__m512)combine((Vec<float>)_mm512_shuffle_f32x4(q0, q1, 0x88),
                                     (Vec<float>)_mm512_shuffle_f32x4(q0, q1, 0xdd));
  const __m512 high = (__m512)combine((Vec<float>)_mm512_shuffle_f32x4(q2, q3, 0x88),
                                      (Vec<float>)_mm512_shuffle_f32x4(q2, q3, 0xdd));
  return combine((Vec<float>)_mm512_shuffle_f32x4(low, high, 0x88), (Vec<float>)_mm512_shuffle_f32x4(low, high, 0xdd));
#else
  const __m256 q0 = (__m256)quads[0], q1 = (__m256)quads[1];
  return combine((Vec<float>)_mm256_permute2f128_ps(q0, q1, 0x20), (Vec<float>)_mm256_permute2f128_ps(q0, q1, 0x31));
#endif
}

#endif  // CHARGPT_ISA_LEVEL >= 1

// e^x for x not much above 0, as 2^n · 2^f with n an integer and |f| ≤ 1/2. The polynomials interpolate 2^f at Chebyshev
// nodes: relative error 3e-9 in degree 6, and in double precision Taylor's of degree 13: 4e-18.
CHARGPT_INLINE Vec<float> exponential(Vec<float> x) {
  constexpr float kLog2e = 1.44269504f, kLowest = -87.0f;  // below, the result would be subnormal
  constexpr float kC[] = {1.0f, 0.69314718246f, 0.24022650719f, 0.05550327152f, 0.00961805694f, 0.00134004280f,
                          0.00015461444f};
#if CHARGPT_ISA_LEVEL >= 2
  x = (Vec<float>)_mm512_max_ps((__m512)broadcast(kLowest), (__m512)x);  // in this order NaN stays NaN
  const Vec<float> n = (Vec<float>)_mm512_roundscale_ps((__m512)(x * kLog2e), _MM_FROUND_TO_NEAREST_INT);
#else
  x = x < kLowest ? broadcast(kLowest) : x;
  constexpr float kShift = 12582912.0f;    // 1.5 · 2^23: adding it rounds to an integer, held in the low bits
  const Vec<float> shifted = x * kLog2e + kShift;
  const Vec<float> n = shifted - kShift;
#endif
  const Vec<float> f = kFuses ? x * kLog2e - n  // one rounding: this compiles to a fused multiply-add
                              : (x - n * 0.693359375f + n * 2.12194440e-4f) * kLog2e;  // ln 2; its first part is exact
  Vec<float> y = broadcast(kC[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) y = y * f + kC[i];
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return (Vec<float>)((Vec<int32_t>)y + ((Vec<int32_t>)shifted << 23));
#endif
}

#if CHARGPT_ISA_LEVEL >= 3
// The same where the result is rounded to bfloat16, in 8 instructions instead of 11: n is rounded down, as scalef does
// by itself, and 2^f = 1 + f q(f) on [0, 1) has a minimax q of degree 4: relative error 8e-08. Degree 3 (3e-6) would
// do for P, but shows in lse.
CHARGPT_INLINE Vec<float> coarse_exponential(Vec<float> x) {
  const __m512 t = (__m512)(x * 1.44269504f);
  const Vec<float> f = (Vec<float>)_mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // of -inf: 0
  Vec<float> q = broadcast(0.00186712982f);
  q = q * f + 0.00901703071f;
  q = q * f + 0.05579991266f;
  q = q * f + 0.24016444385f;
  q = q * f + 0.69315129519f;
  return (Vec<float>)_mm512_scalef_ps((__m512)(q * f + 1.0f), t);
}
#endif

CHARGPT_INLINE Vec<double> exponential(Vec<double> x) {
  constexpr double kLog2e = 1.4426950408889634, kLn2High = 0x1.62e42fefap-1, kLn2Low = 0x1.cf79abc9e3b3ap-40;
  constexpr double kShift = 6755399441055744.0;  // 1.5 · 2^52
  x = x < -708.0 ? broadcast(-708.0) : x;
  const Vec<double> shifted = x * kLog2e + kShift;
  const Vec<double> n = shifted - kShift;
  const Vec<double> f = (x - n * kLn2High) - n * kLn2Low;
  Vec<double> y = broadcast(1.0);
#pragma GCC unroll 13
  for (int i = 13; i >= 1; --i) y = y * f * (1.0 / i) + 1.0;
  return (Vec<double>)((Vec<int64_t>)y + ((Vec<int64_t>)shifted << 52));
}

// bfloat16, kept in uint16_t: the upper half of a float.

typedef uint16_t HalfVec __attribute__((vector_size(CHARGPT_VECTOR_BYTES / 2)));

CHARGPT_INLINE Vec<float> widen(HalfVec x) {
#if CHARGPT_ISA_LEVEL >= 2
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16);
#elif CHARGPT_ISA_LEVEL == 1
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)x), 16);
#else
  return (Vec<float>)(__builtin_convertvector(x, Vec<uint32_t>) << 16);
#endif
}

CHARGPT_INLINE HalfVec lower_halves(Vec<uint32_t> x) {  // of words below 2^16
#if CHARGPT_ISA_LEVEL == 1
  return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, HalfVec);
#endif
}

CHARGPT_INLINE Vec<uint32_t> rounded_to_half(Vec<uint32_t> bits) {  // to the nearest, ties to even
  return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
}

CHARGPT_INLINE HalfVec narrow(Vec<float> x) {
#if CHARGPT_ISA_LEVEL >= 3
  return (HalfVec)_mm512_cvtneps_pbh((__m512)x);
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  return lower_halves(x == x ? rounded_to_half(bits) : (bits >> 16) | 0x40);
#endif
}

// The same, cheaper, for what was computed from bfloat16: the lower half of its NaN is empty and cannot carry far.
CHARGPT_INLINE HalfVec narrow_again(Vec<float> x) {
#if CHARGPT_ISA_LEVEL >= 3
  return narrow(x);
#else
  return lower_halves(rounded_to_half((Vec<uint32_t>)x));
#endif
}

CHARGPT_INLINE HalfVec load_half(const uint16_t* p, int n) {  // the first min(n, lanes) elements, and zeros
  HalfVec v{};
  constexpr int kAll = kLanes<float>;
  if (n >= kAll) {
    __builtin_memcpy(&v, p, sizeof v);
  } else {
#if CHARGPT_ISA_LEVEL >= 2
    v = (HalfVec)_mm256_maskz_loadu_epi16((1u << n) - 1, p);
#else
    __builtin_memcpy(&v, p, n * sizeof(uint16_t));
#endif
  }
  return v;
}

CHARGPT_INLINE void store_half(uint16_t* p, HalfVec v, int n) {
  constexpr int kAll = kLanes<float>;
  if (n >= kAll) {
    __builtin_memcpy(p, &v, sizeof v);
  } else {
#if CHARGPT_ISA_LEVEL >= 2
    _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)v);
#else
    __builtin_memcpy(p, &v, n * sizeof(uint16_t));
#endif
  }
}

#if CHARGPT_ISA_LEVEL >= 1
CHARGPT_INLINE void stream(uint16_t* p, HalfVec a, HalfVec b) {  // as above: one vector of both
#if CHARGPT_ISA_LEVEL >= 2
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)a), (__m256i)b, 1));
#else
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i((__m128i)b, (__m128i)a));
#endif
}
#endif

// a0 b0 a1 b1 …: the lower halves of a and b, and their upper halves
template <class T, size_t... I>
CHARGPT_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(I % 2 == 0 ? I / 2 : I / 2 + sizeof...(I))...);
}
template <class T, size_t... I>
CHARGPT_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b, std::index_sequence<I...>) {
  return __builtin_shufflevector(
      a, b, static_cast<int>((I % 2 == 0 ? I / 2 : I / 2 + sizeof...(I)) + sizeof...(I) / 2)...);
}
template <class T>
CHARGPT_INLINE Vec<T> interleave_low(Vec<T> a, Vec<T> b) {
  return interleave_low<T>(a, b, std::make_index_sequence<kLanes<T>>());
}
template <class T>
CHARGPT_INLINE Vec<T> interleave_high(Vec<T> a, Vec<T> b) {
  return interleave_high<T>(a, b, std::make_index_sequence<kLanes<T>>());
}

// Transposes a square of kLanes vectors in place: exchanges its off-diagonal quarters, then those of the quarters, and so
// on down to single elements.
template <class T, int kHalf, size_t... E>
CHARGPT_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<E...>) {
  constexpr int kN = sizeof...(E);
  const Vec<T> upper = __builtin_shufflevector(a, b, static_cast<int>(E & kHalf ? kN + E - kHalf : E)...);
  b = __builtin_shufflevector(a, b, static_cast<int>(E & kHalf ? kN + E : E + kHalf)...);
  a = upper;
}
template <class T, int kHalf = kLanes<T> / 2>
CHARGPT_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if ((i & kHalf) == 0) exchange<T, kHalf>(rows[i], rows[i + kHalf], std::make_index_sequence<kLanes<T>>());
  }
  if constexpr (kHalf > 1) transpose<T, kHalf / 2>(rows);
}

}  // namespace chargpt::cpu::CHARGPT_ISA
