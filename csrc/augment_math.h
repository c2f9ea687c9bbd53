// The arithmetic of the augmentation, for host and device. T is float or a vector of floats.
//
// Channels rotate in interleaved pairs (2n, 2n + 1). What is done to a channel x needs its partner in the pair, the cosine of the
// pair's phase, and its sine with the sign of the channel: -sin for the even one, +sin for the odd one.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define SISA_INLINE __host__ __device__ __forceinline__
#else
#define SISA_INLINE inline __attribute__((always_inline))  // see cpu/isa.h
#endif

namespace sisa {

constexpr double kTwoPi = 6.283185307179586476925;
constexpr double kLowestLogDecay = -1e3;  // exp of it is 0 in fp64; as in reference.py
constexpr double kSmallestLam = 1e-24;    // stands for 0, which would divide its own gradient away; no score sees it

// R(phase) x
template <class T>
SISA_INLINE T rotate(T x, T partner, T cos, T signed_sin) {
  return x * cos + partner * signed_sin;
}

// R(-phase) x
template <class T>
SISA_INLINE T unrotate(T x, T partner, T cos, T signed_sin) {
  return x * cos - partner * signed_sin;
}

// At u = e^x R(phase) c with du = dL/du: dL/dphase of the pair, in the even channel.
template <class T>
SISA_INLINE T d_phase(T u, T u_partner, T du, T du_partner) {
  return u * du_partner - u_partner * du;
}

// The phase modulo 2 pi, in [-pi, pi]: what a running sum carries so that it keeps its digits at any length.
SISA_INLINE double wrap(double phase) {
  return phase - kTwoPi * rint(phase * (1 / kTwoPi));
}

// The cosine and sine of a phase, to 7e-8, without a branch. The phase is taken to the nearest quarter turn in fp64, so that none
// of its digits is lost.
SISA_INLINE void cos_sin(double phase, float& cos, float& sin) {
  constexpr double kInteger = 0x1.8p52;  // added to a double, it leaves the nearest integer in the last bits
  const double shifted = phase * 0.63661977236758134308 + kInteger;
  const auto quarters = static_cast<uint32_t>(std::bit_cast<uint64_t>(shifted));
  const double rest = phase - (shifted - kInteger) * 1.57079632679489661923;
  const float x = static_cast<float>(rest), low = static_cast<float>(rest - x), xx = x * x;
  // Minimax over [-pi / 4, pi / 4] (Cephes), and the first order of what rounding the angle took from it.
  const float s_tail = x * xx * (-1.6666654611e-1f + xx * (8.3321608736e-3f + xx * -1.9515295891e-4f));
  const float c_tail = xx * (-0.5f + xx * (4.166664568298827e-2f + xx * (-1.388731625493765e-3f + xx * 2.443315711809948e-5f)));
  const float s = x + (s_tail + low * (1 + c_tail)), c = 1 + (c_tail - low * x);
  const uint32_t sin_bits = std::bit_cast<uint32_t>(quarters & 1 ? c : s) ^ (quarters & 2) << 30;
  const uint32_t cos_bits = std::bit_cast<uint32_t>(quarters & 1 ? s : c) ^ ((quarters + 1) & 2) << 30;
  cos = std::bit_cast<float>(cos_bits), sin = std::bit_cast<float>(sin_bits);
}

// These two let a NaN through.
SISA_INLINE double bounded_log_decay(double x) {
  return x < kLowestLogDecay ? kLowestLogDecay : x;
}

SISA_INLINE double clamped(double x, double bound) {
  return x > bound ? bound : x < -bound ? -bound : x;
}

// The tokens [begin, largest_end) of a segment have its largest g, [smallest_begin, end) its smallest.
struct Extremes {
  int64_t largest_end, smallest_begin;
};

SISA_INLINE Extremes extremes_of(const float* log_decay, int64_t stride, int64_t begin, int64_t end) {
  int64_t largest_end = begin + 1, smallest_begin = end - 1;
  while (largest_end < end && log_decay[largest_end * stride] == 0) ++largest_end;
  while (smallest_begin > begin && log_decay[smallest_begin * stride] == 0) --smallest_begin;
  return {largest_end, smallest_begin};
}

SISA_INLINE double bounded_lam(double lam) {
  return lam < kSmallestLam ? kSmallestLam : lam;
}

// The factors s of query and key. Shared key heads leave all of s^2 to the query, since lam differs among the heads of one key.
SISA_INLINE double query_scale(double head_width, double lam, bool shared) {
  const double square = sqrt(head_width) * bounded_lam(lam);
  return shared ? square : sqrt(square);
}

SISA_INLINE double key_scale(double head_width, double lam, bool shared) {
  return shared ? 1.0 : sqrt(sqrt(head_width) * bounded_lam(lam));
}

// dL/dlam from the sum of dL/dexponent over what carries lam: all of s^2 on the query, or half of it on either side.
SISA_INLINE double d_lam(double total, double lam, bool shared) {
  return total / ((shared ? 1.0 : 2.0) * bounded_lam(lam));
}

}  // namespace sisa
