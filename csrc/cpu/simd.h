// Vectors of float, double, bfloat16 and integers for one instruction set: included by kernel headers that foreach_isa.h
// compiles. Arithmetic is the compiler's own on vector types (+, *, <, ?:); only what it cannot express is spelt out.

namespace chargpt::cpu::CHARGPT_ISA {

#define CHARGPT_INLINE [[gnu::always_inline]] inline

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

// The first n < kLanes elements, and zeros. Touches no memory behind them.
template <class T>
CHARGPT_INLINE Vec<T> load_first(const void* p, int n) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_epi32((1u << n) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vec<T>)_mm512_maskz_loadu_epi64((1u << n) - 1, p);
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
#endif
  __builtin_memcpy(p, &v, n * sizeof(T));
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

template <class T>
CHARGPT_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return (Vec<T>)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <class T>
CHARGPT_INLINE T sum_of(Vec<T> v) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_add_ps((__m512)v);
#endif
  T total = v[0];
  for (int i = 1; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
CHARGPT_INLINE T maximum_of(Vec<T> v) {
#if CHARGPT_ISA_LEVEL >= 2
  if constexpr (std::is_same_v<T, float>) return _mm512_reduce_max_ps((__m512)v);
#endif
  T top = v[0];
  for (int i = 1; i < kLanes<T>; ++i) top = v[i] > top ? v[i] : top;
  return top;
}

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
#if CHARGPT_ISA_LEVEL >= 1
  const Vec<float> f = x * kLog2e - n;  // one rounding: this compiles to a fused multiply-add
#else
  const Vec<float> f = (x - n * 0.693359375f + n * 2.12194440e-4f) * kLog2e;  // ln 2 in two parts; the first is exact
#endif
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
#else
  return (Vec<float>)(__builtin_convertvector(x, Vec<uint32_t>) << 16);
#endif
}

CHARGPT_INLINE HalfVec narrow(Vec<float> x) {  // to the nearest, ties to even
#if CHARGPT_ISA_LEVEL >= 3
  return (HalfVec)_mm512_cvtneps_pbh((__m512)x);
#else
  const Vec<uint32_t> bits = (Vec<uint32_t>)x;
  const Vec<uint32_t> rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Vec<uint32_t> nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, HalfVec);
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
