// Parameters of the kernels: plain data, strides in elements, no torch types, so that every back end can take them.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sisa {

enum class DType : int32_t { float32, bfloat16, float16 };

// Calls f with a std::type_identity of the dtype; the types of half precision are the compiler's.
template <class BFloat16, class Half, class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(std::type_identity<float>());
    case DType::bfloat16: return f(std::type_identity<BFloat16>());
    case DType::float16: return f(std::type_identity<Half>());
  }
}

// A tensor [batch, length, heads, channels] of any strides (a view of a packed projection, for one). data is null where absent.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::float32;
  int64_t batch = 0, token = 0, head = 0, channel = 0;
};

// sisa::augment. In the backward q_aug and k_aug hold the incoming gradients.
struct AugmentParams {
  int64_t batch, length, heads, key_heads, head_width, state_width, width;
  Rows q, k, b, c, log_decay, theta;  // log_decay has one channel, theta state_width / 2
  Rows cos, sin;                      // rotary tables [length, head_width / 2], one head, batch stride 0
  const float* lam;                   // [heads]
  const int64_t* starts;              // [segments], rising from 0
  int64_t segments;
  double clamp;
  Rows q_aug, k_aug;
};

// Calls f with the types of the inputs and of the augmented tensors.
template <class BFloat16, class Half, class F>
void with_types(const AugmentParams& p, F f) {
  with_type<BFloat16, Half>(p.q.dtype, [&]<class T>(std::type_identity<T> inputs) {
    with_type<BFloat16, Half>(p.q_aug.dtype, [&]<class O>(std::type_identity<O> augmented) { f(inputs, augmented); });
  });
}

struct AugmentBackwardParams : AugmentParams {
  Rows dq, dk, db, dc;
  float *dlog_decay, *dtheta, *dlam;  // contiguous
  const double *decay_flux, *phase_flux;  // [batch, segments, key_heads(, state_width / 2)] contiguous, or null
};

struct DecodeParams;
struct AttentionParams;
struct AttentionBackwardParams;

namespace cpu {

// The kernels compiled for one instruction set; those of attention and decoding take what attention.h and decode.h describe.
struct Kernels {
  void (*augment)(const AugmentParams&);
  void (*augment_backward)(const AugmentBackwardParams&);
  void (*decode)(const DecodeParams&);
  void (*attention)(const AttentionParams&);
  void (*attention_backward)(const AttentionBackwardParams&);
};

// Those of the best instruction set that this CPU runs, or of the best up to the one that SISA_CPU_ISA names; and its name.
const Kernels& kernels();
const char* isa();

}  // namespace cpu

}  // namespace sisa
