// Runs CUDA kernels on the host, for tests where there is no GPU: what csrc/cuda uses of the language and the runtime.
//
// Blocks run one after the other, a block's threads as fibers that give way at __syncthreads and at shuffles. Shared memory is NaN
// when a block begins. A launch fails where the threads of a warp, or of a block, wait at different places, where it asks for more
// shared memory than there is, or writes past what it asked for.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#define SISA_CUDA_SHIM
#define __host__
#define __device__
#define __global__
#define __shared__
#define __launch_bounds__(...)
#define __forceinline__ inline

using std::min;

struct alignas(8) float2 {
  float x, y;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- Numbers of 16 bits --------------------------------------------------------------------------------------------------------

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

using __half = _Float16;

inline float __half2float(__half x) {
  return x;
}

inline __half __float2half_rn(float x) {
  return static_cast<__half>(x);
}

// ---- A block's threads ---------------------------------------------------------------------------------------------------------

namespace shim {

enum class State { running, at_warp, at_block, done };

struct Thread {
  ucontext_t context;
  State state;
  bool odd;  // which of the two places for shuffles is next, so that a fast lane does not overwrite what a slow one will read
  std::vector<char> stack = std::vector<char>(1 << 16);
};

constexpr unsigned kWarpSize = 32;
inline std::vector<Thread> threads(1024);
inline ucontext_t scheduler;
inline uint64_t places[2][1024];
inline std::function<void()> body;
inline double* shared = nullptr;  // all of shared memory; set by who defines it
inline size_t shared_size = 0;
inline bool last_block_first = false;

inline void wait(State where) {
  Thread& thread = threads[threadIdx.x];
  thread.state = where;
  swapcontext(&thread.context, &scheduler);
}

inline void enter() {
  body();
  threads[threadIdx.x].state = State::done;
}

// Runs each of these threads to where it waits next.
inline void resume(unsigned begin, unsigned end) {
  for (threadIdx.x = begin; threadIdx.x < end; ++threadIdx.x) swapcontext(&scheduler, &threads[threadIdx.x].context);
}

inline bool together(unsigned begin, unsigned end) {
  return std::all_of(&threads[begin], &threads[0] + end, [&](const Thread& t) { return t.state == threads[begin].state; });
}

inline bool run_block(size_t shared_bytes) {
  const unsigned count = blockDim.x;
  std::memset(shared, 0xff, shared_size);
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data(), thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler, thread.state = State::running, thread.odd = false;
    makecontext(&thread.context, enter, 0);
  }
  while (threads[0].state != State::done) {
    for (unsigned warp = 0; warp < count; warp += kWarpSize) {
      const unsigned end = std::min(warp + kWarpSize, count);
      do {
        resume(warp, end);
        if (!together(warp, end)) return false;
      } while (threads[warp].state == State::at_warp);
    }
    if (!together(0, count)) return false;
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(shared);
  return std::all_of(bytes + shared_bytes, bytes + shared_size, [](unsigned char byte) { return byte == 0xff; });
}

template <class T>
T exchange(T x, unsigned from) {
  const unsigned self = threadIdx.x;
  uint64_t* place = places[threads[self].odd ^= true];
  std::memcpy(&place[self], &x, sizeof(T));
  wait(State::at_warp);
  if (from / kWarpSize == self / kWarpSize) std::memcpy(&x, &place[from], sizeof(T));
  return x;
}

}  // namespace shim

inline void __syncthreads() {
  shim::wait(shim::State::at_block);
}

template <class T>
T __shfl_up_sync(unsigned, T x, unsigned step) {
  return shim::exchange(x, threadIdx.x - step);
}

template <class T>
T __shfl_down_sync(unsigned, T x, unsigned step) {
  return shim::exchange(x, threadIdx.x + step);
}

// ---- Launches ------------------------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid value" : "launch failure";
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  if (config->dynamicSmemBytes > shim::shared_size || config->blockDim.x > shim::threads.size()) return cudaErrorInvalidValue;
  const std::tuple<Params...> params(args...);
  shim::body = [&] { std::apply(kernel, params); };
  gridDim = config->gridDim, blockDim = config->blockDim;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx.x = shim::last_block_first ? gridDim.x - 1 - i : i;
    if (!shim::run_block(config->dynamicSmemBytes)) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}
