// The arithmetic of the augmentation, for host and device. T is float or a vector of floats.
//
// Channels rotate in interleaved pairs (2n, 2n + 1). What is done to a channel x needs its partner in the pair, the cosine of the
// pair's phase, and its sine with the sign of the channel: -sin for the even one, +sin for the odd one.
#pragma once

#include <cmath>

#ifdef __CUDACC__
#define SISA_INLINE __host__ __device__ __forceinline__
#else
#define SISA_INLINE inline
#endif

namespace sisa {

constexpr double kTwoPi = 6.283185307179586476925;
constexpr double kLowestLogDecay = -1e3;  // exp of it is 0 in fp64; as in reference.py

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

// These two let a NaN through.
SISA_INLINE double bounded_log_decay(double x) {
  return x < kLowestLogDecay ? kLowestLogDecay : x;
}

SISA_INLINE double clamped(double x, double bound) {
  return x > bound ? bound : x < -bound ? -bound : x;
}

// The factors s of query and key. Shared key heads leave all of s^2 to the query, since lam differs among the heads of one key.
SISA_INLINE double query_scale(double head_width, double lam, bool shared) {
  const double square = sqrt(head_width) * lam;
  return shared ? square : sqrt(square);
}

SISA_INLINE double key_scale(double head_width, double lam, bool shared) {
  return shared ? 1.0 : sqrt(sqrt(head_width) * lam);
}

}  // namespace sisa
