// What the augmentation's kernels are made of: rows in 16-byte words, scans of a warp, and how the sequence is cut.
#pragma once

#ifndef SISA_CUDA_SHIM  // tests/cuda_host, where the kernels run on the host
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "../augment_math.h"
#include "augment.h"

namespace sisa::cuda {

constexpr int kWarp = 32;
constexpr int kChunk = kWarp;     // tokens; one a lane, so that a warp scans a chunk
constexpr int kUnit = 8;          // channels a thread takes at a time: 16 bytes of bf16 or fp16
constexpr unsigned kLanes = ~0u;  // all of a warp

// ---- Rows ----------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }

__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

template <class T>
__device__ __forceinline__ T* address(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t channel) {
  return static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head + channel * x.channel;
}

template <class T>
struct alignas(16) Word {
  static constexpr int size = 16 / sizeof(T);
  T x[size];
};

// Channels in registers.
template <int N>
struct Channels {
  float x[N];
};

// Whole words where the address, the stride and the count allow.
template <int N, class T>
__device__ __forceinline__ bool in_words(const T* at, int64_t stride, int count) {
  static_assert(N % Word<T>::size == 0);
  return stride == 1 && count >= N && reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

// The first count of N channels; the rest are zero and not read.
template <int N, class T>
__device__ __forceinline__ Channels<N> load(const T* in, int64_t stride, int count) {
  Channels<N> out;
  if (in_words<N>(in, stride, count)) {
#pragma unroll
    for (int w = 0; w < N / Word<T>::size; ++w) {
      const Word<T> word = reinterpret_cast<const Word<T>*>(in)[w];
#pragma unroll
      for (int i = 0; i < Word<T>::size; ++i) out.x[w * Word<T>::size + i] = widened(word.x[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out.x[i] = i < count ? widened(in[i * stride]) : 0.0f;
  }
  return out;
}

template <int N, class T>
__device__ __forceinline__ void store(const Channels<N>& in, T* out, int count) {
  if (in_words<N>(out, 1, count)) {
#pragma unroll
    for (int w = 0; w < N / Word<T>::size; ++w) {
      Word<T> word;
#pragma unroll
      for (int i = 0; i < Word<T>::size; ++i) narrow(in.x[w * Word<T>::size + i], word.x[i]);
      reinterpret_cast<Word<T>*>(out)[w] = word;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) narrow(in.x[i], out[i]);
    }
  }
}

// The cosines and sines of a unit's pairs.
struct Angles {
  Channels<kUnit / 2> cos, sin;
};

template <bool inverse>
__device__ __forceinline__ Channels<kUnit> rotated(const Channels<kUnit>& in, const Angles& angles) {
  Channels<kUnit> out;
#pragma unroll
  for (int i = 0; i < kUnit; ++i) {
    const float cos = angles.cos.x[i / 2], sin = i % 2 ? angles.sin.x[i / 2] : -angles.sin.x[i / 2];
    out.x[i] = inverse ? unrotate(in.x[i], in.x[i ^ 1], cos, sin) : rotate(in.x[i], in.x[i ^ 1], cos, sin);
  }
  return out;
}

__device__ __forceinline__ Channels<kUnit> scaled(Channels<kUnit> x, float factor) {
#pragma unroll
  for (int i = 0; i < kUnit; ++i) x.x[i] *= factor;
  return x;
}

// ---- Scans of a warp -----------------------------------------------------------------------------------------------------------

// The sum over this lane and those before it.
__device__ __forceinline__ double scan(double x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_up_sync(kLanes, x, step);
    if (lane >= step) x += other;
  }
  return x;
}

// The sum over this lane and those after it; lane 0 has the total.
__device__ __forceinline__ double reverse_scan(double x, int lane) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const double other = __shfl_down_sync(kLanes, x, step);
    if (lane + step < kWarp) x += other;
  }
  return x;
}

// ---- How the sequence is cut ---------------------------------------------------------------------------------------------------

// Chunks of at most kChunk tokens, none across a segment's boundary. A segment begins at a token and with a chunk.
struct Segment {
  int begin, chunk;
};

struct Chunk {
  int begin, tokens;
  int segment, segment_begin, first, last;  // the segment's chunks are first .. last - 1
};

struct Cut {
  const Segment* table;  // on the device; the first segment's place in it is not used
  int segments, chunks, length;

  __device__ Segment segment(int n) const {
    return n == 0 ? Segment{0, 0} : n == segments ? Segment{length, chunks} : table[n];
  }

  __device__ Chunk chunk(int n) const {
    int low = 0, high = segments;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (segment(middle).chunk <= n ? low : high) = middle;
    }
    const Segment here = segment(low), next = segment(low + 1);
    const int begin = here.begin + (n - here.chunk) * kChunk;
    return {begin, min(kChunk, next.begin - begin), low, here.begin, here.chunk, next.chunk};
  }
};

}  // namespace sisa::cuda
