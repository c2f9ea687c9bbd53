// The arithmetic of one token of the augmentation, for host and device. T is float, double or a vector of floats.
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

// The interleaved channels (2n, 2n + 1).
template <class T>
struct Pair {
  T x0, x1;
};

template <class T>
SISA_INLINE Pair<T> operator*(T factor, Pair<T> x) {
  return {factor * x.x0, factor * x.x1};
}

// R(phase) x
template <class T>
SISA_INLINE Pair<T> rotate(Pair<T> x, T cos, T sin) {
  return {x.x0 * cos - x.x1 * sin, x.x0 * sin + x.x1 * cos};
}

// R(-phase) x
template <class T>
SISA_INLINE Pair<T> unrotate(Pair<T> x, T cos, T sin) {
  return {x.x0 * cos + x.x1 * sin, x.x1 * cos - x.x0 * sin};
}

// At u = e^x R(phase) c with du = dL/du: the pair's share of dL/dx, and its dL/dphase.
template <class T>
SISA_INLINE T d_exponent(Pair<T> du, Pair<T> u) {
  return du.x0 * u.x0 + du.x1 * u.x1;
}

template <class T>
SISA_INLINE T d_phase(Pair<T> du, Pair<T> u) {
  return u.x0 * du.x1 - u.x1 * du.x0;
}

// The phase modulo 2 pi, in [-pi, pi]: what a running sum carries so that it keeps its digits at any length.
SISA_INLINE double wrap(double phase) {
  return phase - kTwoPi * rint(phase * (1 / kTwoPi));
}

// Comparisons below are written so that a NaN passes through.
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
