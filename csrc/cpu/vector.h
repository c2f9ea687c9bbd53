// The few vector operations that at::vec lacks, for AVX512, AVX2 and neither.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <type_traits>

#include "../augment_math.h"

namespace sisa::cpu {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();

// V elements as fp32.
inline Vec load(const float* in) {
  return Vec::loadu(in);
}

inline Vec load(const at::BFloat16* in) {
  Vec x;
  at::vec::load_fp32_from_bf16(in, x);
  return x;
}

inline Vec load(const at::Half* in) {
  Vec x;
  at::vec::load_fp32_from_fp16(in, x);
  return x;
}

inline void store(Vec x, float* out) {
  x.store(out);
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
inline auto narrowed(Vec x, const at::BFloat16*) {
  return at::vec::cvtfp32_bf16(x);
}

inline auto narrowed(Vec x, const at::Half*) {
  return at::vec::cvtfp32_fp16(x);
}

template <class T>
void store(Vec x, T* out) {
  const auto half = narrowed(x, out);
  std::memcpy(static_cast<void*>(out), &half, sizeof(half));
}
#else
template <class T>
void store(Vec x, T* out) {
  for (int64_t i = 0; i < V; ++i) out[i] = static_cast<T>(x[i]);
}
#endif

// A store past the caches, to an address aligned to V elements; fence() before another thread may read it.
#if defined(CPU_CAPABILITY_AVX512)
inline void stream(Vec x, float* out) {
  _mm512_stream_ps(out, x);
}

template <class T>
void stream(Vec x, T* out) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(out), narrowed(x, out));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline void stream(Vec x, float* out) {
  _mm256_stream_ps(out, x);
}

template <class T>
void stream(Vec x, T* out) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(out), narrowed(x, out));
}
#else
template <class T>
void stream(Vec x, T* out) {
  store(x, out);
}
#endif

inline void fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// The first count < V of them; the rest are zero.
template <class T>
Vec load(const T* in, int64_t count) {
  T whole[V] = {};
  std::memcpy(whole, in, count * sizeof(T));
  return load(whole);
}

template <class T>
void store(Vec x, T* out, int64_t count, bool /*streamed*/) {
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
void for_channels(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + V <= n; i += V) body(i, Whole());
  if (i < n) body(i, n - i);
}

// Each channel's partner in its pair: x1 x0 x3 x2 ...
inline Vec partners(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_permute_ps(x, 0xB1);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_permute_ps(x, 0xB1);
#else
  float in[V], out[V];
  x.store(in);
  for (int64_t i = 0; i < V; ++i) out[i] = in[i ^ 1];
  return Vec::loadu(out);
#endif
}

// From a pair's cosine and sine to its two channels' cosines and signed sines.
inline void expand(float c, float s, float* cos, float* sin) {
  cos[0] = cos[1] = c;
  sin[0] = -s, sin[1] = s;
}

// Cosines and signed sines of n pairs' phases; the loop is plain for the compiler to make vectors of.
inline void cos_sin(const double* phase, int64_t n, float* __restrict cos, float* __restrict sin) {
  for (int64_t i = 0; i < n; ++i) {
    float c, s;
    sisa::cos_sin(phase[i], c, s);
    expand(c, s, cos + 2 * i, sin + 2 * i);
  }
}

// sums[n] += x[2 n]
inline void add_even(Vec x, double* sums) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512d even = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_cvtepi64_epi32(_mm512_castps_si512(x))));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), even));
#else
  float all[V];
  x.store(all);
  for (int64_t i = 0; i < V / 2; ++i) sums[i] += all[2 * i];
#endif
}

inline float sum(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  float all[V], total = 0;
  x.store(all);
  for (int64_t i = 0; i < V; ++i) total += all[i];
  return total;
#endif
}

// A dot product kept in fp64: exact products, V / 2 running sums in each half.
class Dot {
 public:
  void add(Vec x, Vec y) {
#if defined(CPU_CAPABILITY_AVX512)
    lo_ = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_castps512_ps256(y)), lo_);
    hi_ = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)), hi_);
#elif defined(CPU_CAPABILITY_AVX2)
    lo_ = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_castps256_ps128(y)), lo_);
    hi_ = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)), _mm256_cvtps_pd(_mm256_extractf128_ps(y, 1)), hi_);
#else
    for (int64_t i = 0; i < V; ++i) total_ += static_cast<double>(x[i]) * y[i];
#endif
  }

  double total() const {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_reduce_add_pd(_mm512_add_pd(lo_, hi_));
#elif defined(CPU_CAPABILITY_AVX2)
    double sums[4];
    _mm256_storeu_pd(sums, _mm256_add_pd(lo_, hi_));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
#else
    return total_;
#endif
  }

 private:
#if defined(CPU_CAPABILITY_AVX512)
  __m512d lo_ = _mm512_setzero_pd(), hi_ = _mm512_setzero_pd();
#elif defined(CPU_CAPABILITY_AVX2)
  __m256d lo_ = _mm256_setzero_pd(), hi_ = _mm256_setzero_pd();
#else
  double total_ = 0;
#endif
};

}  // namespace sisa::cpu
