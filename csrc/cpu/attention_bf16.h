// What products of tiles read from memory: numbers, or words of two bf16 each.
//
// A word passes for a float: it is loaded, stored, transposed and broadcast as one, since that changes no bit.
#pragma once

#include "vector.h"

namespace sisa::cpu::SISA_ISA {

struct Single {
  static constexpr int64_t kNumbers = 1;
  SISA_INLINE static Vec broadcast(float x) { return SISA_ISA::broadcast(x); }
  SISA_INLINE static Vec fma(Vec x, Vec y, Vec z) { return SISA_ISA::fma(x, y, z); }
  SISA_INLINE static Vec some(Vec x, int64_t, int64_t) { return x; }
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;

// Two neighbours of the depth, channels or tokens, whose products are added to one sum in fp32.
struct Pairs {
  static constexpr int64_t kNumbers = 2;
  SISA_INLINE static Vec broadcast(float x) { return std::bit_cast<Vec>(_mm512_set1_epi32(std::bit_cast<int32_t>(x))); }
  SISA_INLINE static Vec fma(Vec x, Vec y, Vec z) {
    return _mm512_dpbf16_ps(z, std::bit_cast<__m512bh>(x), std::bit_cast<__m512bh>(y));
  }
  // Those of each pair's numbers in [begin, end), the others 0.
  SISA_INLINE static Vec some(Vec x, int64_t begin, int64_t end) {
    const uint32_t keep = (begin > 0 ? 0 : 0xffff) | (end < 2 ? 0 : 0xffff0000);
    return std::bit_cast<Vec>(std::bit_cast<Word>(x) & keep);
  }
};

// 2 V numbers rounded to bf16 as they come: neighbours to a word.
SISA_INLINE Vec in_a_row(Vec x, Vec next) {
  return std::bit_cast<Vec>(_mm512_cvtne2ps_pbh(next, x));
}

// x_n and y_n to a word.
SISA_INLINE Vec zipped(Vec x, Vec y) {
  using Shorts = uint16_t __attribute__((vector_size(64)));
  const Shorts both = std::bit_cast<Shorts>(in_a_row(x, y));
  return std::bit_cast<Vec>(__builtin_shufflevector(
      both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
      31));
}

// x rounded to bf16.
SISA_INLINE Vec rounded_to_bf16(Vec x) {
  return zipped(Vec{}, x);  // the lower half of a number is 0
}
#else
constexpr bool kHasPairs = false;
using Pairs = Single;
SISA_INLINE Vec in_a_row(Vec x, Vec) { return x; }  // not called
SISA_INLINE Vec zipped(Vec x, Vec) { return x; }
SISA_INLINE Vec rounded_to_bf16(Vec x) { return x; }
#endif

// A row's N vectors to rows of bf16.
template <int N>
SISA_INLINE void store_row(const Vec (&x)[N], BFloat16* to) {
#pragma GCC unroll 16
  for (int n = 0; n < N; n += 2) {
    const Vec pair = in_a_row(x[n], n + 1 < N ? x[n + 1] : Vec{});
    std::memcpy(static_cast<void*>(to + n * V), &pair, (n + 1 < N ? 2 : 1) * V * sizeof(BFloat16));
  }
}

}  // namespace sisa::cpu::SISA_ISA
