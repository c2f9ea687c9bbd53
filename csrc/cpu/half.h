// Numbers of 16 bits, one at a time.
#pragma once

#include <bit>
#include <cstdint>

#include "../augment_math.h"

namespace sisa {

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

SISA_INLINE float widened(float x) {
  return x;
}

SISA_INLINE float widened(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}

// By the bits: compilers' own fp16 needs a libgcc that older systems lack.
SISA_INLINE float widened(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, exponent = x.bits >> 10 & 31, rest = x.bits & 1023;
  const float magnitude = exponent == 0    ? static_cast<float>(rest) * 0x1p-24f
                          : exponent == 31 ? std::bit_cast<float>(0x7f800000 | rest << 13)
                                           : std::bit_cast<float>((exponent + 112) << 23 | rest << 13);
  return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
}

// To the nearest, even where two are.
SISA_INLINE void narrow(float x, float& out) {
  out = x;
}

SISA_INLINE void narrow(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  out.bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fc0;
}

SISA_INLINE void narrow(float x, Half& out) {
  const uint32_t all = std::bit_cast<uint32_t>(x), bits = all & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // from 65520 on, infinity
  } else if (bits < 0x38800000) {  // below 2^-14 a half is a multiple of 2^-24
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) * 0x1p24f + 0x1p23f) & 0x7ff;
  } else {
    half = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | (all >> 16 & 0x8000));
}

}  // namespace sisa
