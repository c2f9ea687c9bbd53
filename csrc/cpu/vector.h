// Vectors of V floats by the compiler's own vector types, and the few operations that these lack: for AVX-512, AVX2 and, in plain
// C++, any other instruction set (SSE2, NEON).
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../augment_math.h"
#include "half.h"
#include "isa.h"

namespace sisa::cpu::SISA_ISA {

#if defined(__AVX512F__)
constexpr int64_t V = 16;
#elif defined(__AVX2__)
constexpr int64_t V = 8;
#else
constexpr int64_t V = 4;
#endif

using Vec = float __attribute__((vector_size(4 * V)));
using Int = int32_t __attribute__((vector_size(4 * V)));
using Word = uint32_t __attribute__((vector_size(4 * V)));
using Short = uint16_t __attribute__((vector_size(2 * V)));

inline Vec broadcast(float x) {
  return x - Vec{};
}

// ---- Loads and stores ----------------------------------------------------------------------------------------------------------

// V elements as fp32.
inline Vec load(const float* in) {
  Vec x;
  std::memcpy(&x, in, sizeof(x));
  return x;
}

// The compiler's own conversions of vectors are twice the instructions.
inline Vec load(const BFloat16* in) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
  return std::bit_cast<Vec>(_mm512_slli_epi32(wide, 16));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
  return std::bit_cast<Vec>(_mm256_slli_epi32(wide, 16));
#else
  Short x;
  std::memcpy(&x, in, sizeof(x));
  return std::bit_cast<Vec>(__builtin_convertvector(x, Word) << 16);
#endif
}

inline Vec load(const Half* in) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#else
  Vec x;
  for (int64_t i = 0; i < V; ++i) x[i] = widened(in[i]);
  return x;
#endif
}

// Rounded to nearest even.
inline Short narrowed(Vec x, const BFloat16*) {
  const Word bits = std::bit_cast<Word>(x);
  const Word rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Word half = x == x ? rounded : Word{} + 0x7fc0;
#if defined(__AVX512F__)
  return std::bit_cast<Short>(_mm512_cvtepi32_epi16(std::bit_cast<__m512i>(half)));
#elif defined(__AVX2__)
  const __m256i all = std::bit_cast<__m256i>(half);
  return std::bit_cast<Short>(_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
#else
  return __builtin_convertvector(half, Short);
#endif
}

inline Short narrowed(Vec x, const Half*) {
#if defined(__AVX512F__)
  return std::bit_cast<Short>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return std::bit_cast<Short>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  Half half[V];
  for (int64_t i = 0; i < V; ++i) narrow(x[i], half[i]);
  return std::bit_cast<Short>(half);
#endif
}

inline void store(Vec x, float* out) {
  std::memcpy(out, &x, sizeof(x));
}

template <class T>
void store(Vec x, T* out) {
  const Short half = narrowed(x, out);
  std::memcpy(static_cast<void*>(out), &half, sizeof(half));
}

// A store past the caches, to an address aligned to V elements; fence() before another thread may read it.
inline void stream(Vec x, float* out) {
#if defined(__AVX512F__)
  _mm512_stream_ps(out, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(out, x);
#else
  store(x, out);
#endif
}

template <class T>
void stream(Vec x, T* out) {
#if defined(__AVX512F__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), std::bit_cast<__m256i>(narrowed(x, out)));
#elif defined(__AVX2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), std::bit_cast<__m128i>(narrowed(x, out)));
#else
  store(x, out);
#endif
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first count < V of them; the rest are zero.
template <class T>
Vec load(const T* in, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps((1u << count) - 1, in);
#endif
  T whole[V] = {};
  std::memcpy(whole, in, count * sizeof(T));
  return load(whole);
}

template <class T>
void store(Vec x, T* out, int64_t count, bool /*streamed*/) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(out, (1u << count) - 1, x);
#endif
  T whole[V];
  store(x, whole);
  std::memcpy(out, whole, count * sizeof(T));
}

using Whole = std::integral_constant<int64_t, V>;

template <class T>
Vec load(const T* in, Whole) {
  return load(in);
}

template <class T>
void store(Vec x, T* out, Whole, bool streamed) {
  if (streamed) {
    stream(x, out);
  } else {
    store(x, out);
  }
}

// Calls body(offset, count) over n channels: V at a time with a count of Whole, then the rest.
template <class Body>
__attribute__((always_inline)) inline void for_channels(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + V <= n; i += V) body(i, Whole());
  if (i < n) body(i, n - i);
}

// ---- Arithmetic ----------------------------------------------------------------------------------------------------------------

// x y + z
inline Vec fma(Vec x, Vec y, Vec z) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(x, y, z);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(x, y, z);
#else
  return x * y + z;
#endif
}

// These two give the second where one is a NaN, as x86's instructions do.
inline Vec maximum(Vec x, Vec y) {
#if defined(__AVX512F__)
  return _mm512_max_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_max_ps(x, y);
#else
  return x > y ? x : y;
#endif
}

inline Vec minimum(Vec x, Vec y) {
#if defined(__AVX512F__)
  return _mm512_min_ps(x, y);
#elif defined(__AVX2__)
  return _mm256_min_ps(x, y);
#else
  return x < y ? x : y;
#endif
}

// p 2^n for whole n in [-200, 200].
inline Vec scaled(Vec p, Vec n) {
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  const Int exponent = __builtin_convertvector(n, Int), low = exponent >> 1;  // twice, since 2^n may have no float of its own
  return p * std::bit_cast<Vec>((low + 127) << 23) * std::bit_cast<Vec>((exponent - low + 127) << 23);
#endif
}

inline Vec rounded(Vec x) {  // to the nearest integer, for |x| < 2^22
  constexpr float kInteger = 0x1.8p23f;
  return (x + kInteger) - kInteger;
}

// e^x to 1e-7, relative; 0 and infinity past fp32's range, NaN of NaN. The coefficients are minimax over +-log(2) / 2.
inline Vec exp(Vec x) {
  x = minimum(broadcast(90), maximum(broadcast(-110), x));
  const Vec n = rounded(x * 1.44269504f);
  // ln 2 in two parts, the first of few bits, so that n times it is exact.
  const Vec f = fma(n, broadcast(2.12194440e-4f), fma(n, broadcast(-0.693359375f), x));
  Vec p = broadcast(1.3843647e-3f);
  p = fma(p, f, broadcast(8.374161e-3f));
  p = fma(p, f, broadcast(4.1668e-2f));
  p = fma(p, f, broadcast(1.6666432e-1f));
  p = fma(p, f, broadcast(4.9999994e-1f));
  p = fma(p, f, broadcast(1));
  return scaled(fma(p, f, broadcast(1)), n);
}

// 2^x to 1.5e-7, relative, for x < 128; 0 far below, NaN of NaN. The coefficients are minimax over [0, 1].
inline Vec pow2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
#else
  x = maximum(broadcast(-160), x);
  const Vec n = rounded(x - 0.5f), f = x - n;
#endif
  Vec p = broadcast(1.8775767e-3f);
  p = fma(p, f, broadcast(8.9893397e-3f));
  p = fma(p, f, broadcast(5.5826318e-2f));
  p = fma(p, f, broadcast(2.4015361e-1f));
  p = fma(p, f, broadcast(6.9315308e-1f));
  p = fma(p, f, broadcast(9.9999994e-1f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, x);  // by 2^floor(x)
#else
  return scaled(p, n);
#endif
}

// Whether any lane of x is above that of y.
inline bool any_above(Vec x, Vec y) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, y, _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_GT_OQ)) != 0;
#else
  const Int above = x > y;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// Keeps a value in a register: the compiler neither loads it again nor folds its load into what uses it.
SISA_INLINE void pin(Vec& x) {
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__AVX2__)
  asm("" : "+x"(x));
#else
  (void)x;
#endif
}

// Each channel's partner in its pair: x1 x0 x3 x2 ...
inline Vec partners(Vec x) {
#if defined(__AVX512F__)
  return _mm512_permute_ps(x, 0xB1);
#elif defined(__AVX2__)
  return _mm256_permute_ps(x, 0xB1);
#else
  return Vec{x[1], x[0], x[3], x[2]};
#endif
}

using HalfVec = float __attribute__((vector_size(2 * V)));
using DoubleVec = double __attribute__((vector_size(4 * V)));  // as many

// V / 2 numbers, each twice: x0 x0 x1 x1 ...
inline Vec load_twice(const float* in) {
  HalfVec x;
  std::memcpy(&x, in, sizeof(x));
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3);
#else
  return __builtin_shufflevector(x, x, 0, 0, 1, 1);
#endif
}

// sums[n] += x[n] for n < V / 2
inline void add_half(const float* in, double* sums) {
  HalfVec x;
  DoubleVec sum;
  std::memcpy(&x, in, sizeof(x)), std::memcpy(&sum, sums, sizeof(sum));
  sum += __builtin_convertvector(x, DoubleVec);
  std::memcpy(sums, &sum, sizeof(sum));
}

// -x0 x1 -x2 x3 ...
inline Vec even_negated(Vec x) {
  Word sign;
  for (int64_t i = 0; i < V; ++i) sign[i] = i % 2 == 0 ? 0x80000000u : 0;
  return std::bit_cast<Vec>(std::bit_cast<Word>(x) ^ sign);
}

// The lanes of a and b whose index lacks bit n (kHigh: has it), b's moved to where it is set (a's to where it is not).
template <int n, bool kHigh, int... I>
Vec interleaved(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & n) ? V + (kHigh ? I : I - n) : kHigh ? I + n : I)...);
}

template <int n>
void transpose_by(Vec (&x)[V]) {
  constexpr std::make_integer_sequence<int, V> lanes;
#pragma GCC unroll 16
  for (int64_t i = 0; i < V; ++i) {
    if (i & n) continue;
    const Vec low = interleaved<n, false>(x[i], x[i + n], lanes), high = interleaved<n, true>(x[i], x[i + n], lanes);
    x[i] = low, x[i + n] = high;
  }
}

// V vectors of V lanes, lanes for vectors.
inline void transpose(Vec (&x)[V]) {
  transpose_by<1>(x);
  transpose_by<2>(x);
  if constexpr (V > 4) transpose_by<4>(x);
  if constexpr (V > 8) transpose_by<8>(x);
}

// The sum, or another reduction, of a vector's lanes; all by halves.
template <class Reduce>
float reduced(Vec x, Reduce reduce) {
  float lanes[V];
  store(x, lanes);
#pragma GCC unroll 4
  for (int64_t n = V / 2; n > 0; n /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < n; ++i) lanes[i] = reduce(lanes[i], lanes[i + n]);
  }
  return lanes[0];
}

inline float sum(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  return reduced(x, [](float a, float b) { return a + b; });
#endif
}

inline float largest(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  return reduced(x, [](float a, float b) { return a > b ? a : b; });
#endif
}

// ---- Angles and sums in fp64 ---------------------------------------------------------------------------------------------------

// From a pair's cosine and sine to its two channels' cosines and signed sines.
inline void expand(float c, float s, float* cos, float* sin) {
  cos[0] = cos[1] = c;
  sin[0] = -s, sin[1] = s;
}

// Cosines and sines of n phases; the loop is plain for the compiler to make vectors of.
inline void each_cos_sin(const double* __restrict phase, int64_t n, float* __restrict cos, float* __restrict sin) {
  for (int64_t i = 0; i < n; ++i) sisa::cos_sin(phase[i], cos[i], sin[i]);
}

// Cosines and signed sines of n pairs' phases; the loop is plain for the compiler to make vectors of.
inline void cos_sin(const double* phase, int64_t n, float* __restrict cos, float* __restrict sin) {
  for (int64_t i = 0; i < n; ++i) {
    float c, s;
    sisa::cos_sin(phase[i], c, s);
    expand(c, s, cos + 2 * i, sin + 2 * i);
  }
}

// e^x of n numbers in place, to 1e-10, relative; the loop is plain, too.
inline void exp(double* x, int64_t n) {
  constexpr double kInteger = 0x1.8p52, kLog2 = 0.693147180559945309417;
  for (int64_t i = 0; i < n; ++i) {
    const double bounded = clamped(x[i], 1400);
    const double shifted = bounded * (1 / kLog2) + kInteger, rest = bounded - (shifted - kInteger) * kLog2;
    double p = 1.0 / 40320;  // Taylor's series, for |rest| <= log(2) / 2
    p = p * rest + 1.0 / 5040;
    p = p * rest + 1.0 / 720;
    p = p * rest + 1.0 / 120;
    p = p * rest + 1.0 / 24;
    p = p * rest + 1.0 / 6;
    p = p * rest + 0.5;
    p = (p * rest + 1) * rest + 1;
    // 2^exponent in two parts, of which each has a double.
    const int64_t exponent = static_cast<int64_t>(std::bit_cast<uint64_t>(shifted) << 13) >> 13, low = exponent >> 1;
    x[i] = p * std::bit_cast<double>((low + 1023) << 52) * std::bit_cast<double>((exponent - low + 1023) << 52);
  }
}

// sums[n] += x[2 n]
inline void add_even(Vec x, double* sums) {
#if defined(__AVX512F__)
  const __m512d even = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_cvtepi64_epi32(_mm512_castps_si512(x))));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), even));
#else
  for (int64_t i = 0; i < V / 2; ++i) sums[i] += x[2 * i];
#endif
}

// A dot product kept in fp64: exact products, V running sums.
class Dot {
 public:
  void add(Vec x, Vec y) {
    low_ += wide(half<0>(x)) * wide(half<0>(y));
    high_ += wide(half<1>(x)) * wide(half<1>(y));
  }

  double total() const {
    const DoubleVec sums = low_ + high_;
    double total = 0;
    for (int64_t i = 0; i < V / 2; ++i) total += sums[i];
    return total;
  }

 private:
  using Narrow = float __attribute__((vector_size(2 * V)));
  using Wide = double __attribute__((vector_size(4 * V)));

  template <int i>
  static Narrow half(Vec x) {
#if defined(__AVX512F__)
    return _mm512_extractf32x8_ps(x, i);
#elif defined(__AVX2__)
    return _mm256_extractf128_ps(x, i);
#else
    return Narrow{x[2 * i], x[2 * i + 1]};
#endif
  }

  static Wide wide(Narrow x) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(x);
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(x);
#else
    return __builtin_convertvector(x, Wide);
#endif
  }

  Wide low_{}, high_{};
};

}  // namespace sisa::cpu::SISA_ISA
