// The few vector operations that at::vec lacks, for AVX512, AVX2 and neither.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>
#include <type_traits>

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

inline void store(Vec x, at::BFloat16* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto half = at::vec::cvtfp32_bf16(x);
  std::memcpy(out, &half, sizeof(half));
#else
  for (int64_t i = 0; i < V; ++i) out[i] = static_cast<at::BFloat16>(x[i]);
#endif
}

inline void store(Vec x, at::Half* out) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const auto half = at::vec::cvtfp32_fp16(x);
  std::memcpy(out, &half, sizeof(half));
#else
  for (int64_t i = 0; i < V; ++i) out[i] = static_cast<at::Half>(x[i]);
#endif
}

// A store past the caches, to an address aligned to V elements; fence() before another thread may read it.
template <class T>
void stream(Vec x, T* out) {
#if defined(CPU_CAPABILITY_AVX512)
  alignas(64) T whole[V];
  store(x, whole);
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_load_si512(whole));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_load_si256(reinterpret_cast<const __m256i*>(whole)));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  alignas(32) T whole[V];
  store(x, whole);
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out), _mm256_load_si256(reinterpret_cast<const __m256i*>(whole)));
  } else {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_load_si128(reinterpret_cast<const __m128i*>(whole)));
  }
#else
  store(x, out);
#endif
}

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

inline void sincos(Vec x, Vec& sin, Vec& cos) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto both = Sleef_sincosf16_u10(x);
  sin = both.x, cos = both.y;
#elif defined(CPU_CAPABILITY_AVX2)
  const auto both = Sleef_sincosf8_u10(x);
  sin = both.x, cos = both.y;
#else
  sin = x.sin(), cos = x.cos();
#endif
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
