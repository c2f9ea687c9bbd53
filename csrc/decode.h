// One new token a row over its cache of keys: parameters of the kernel. Plain data, as in sisa.h.
#pragma once

#include "attention.h"

namespace sisa {

// Inputs have one token, Rows of heads or key heads; query head h reads key head h / (heads / key_heads).
struct DecodeParams {
  int64_t batch, heads, key_heads, head_width, value_width;
  int64_t state_width;  // even; 0 unless bias is importance
  Bias bias;
  Rows q, k, v;
  Rows b, c, theta;                // importance alone
  Rows log_decay;                  // one channel; of key heads (importance) or heads (forget)
  const float* lam;                // [heads]; importance alone
  const float* decay_bias;         // [key_heads]: log_decay is -softplus(log_decay + decay_bias), lam softplus(lam); null: as given
  Rows cos, sin;                   // [batch, 1, 1, head_width / 2], or null
  Rows k_cache, v_cache, b_cache;  // a token is a slot; channels lie side by side
  double* g_cache;                 // of the heads of log_decay; slots lie side by side
  int64_t g_batch, g_head;
  double* phase;           // [batch, key_heads, state_width / 2] contiguous
  double* reach;           // [batch, key_heads] contiguous: the largest |b| of the slots so far
  const int64_t* lengths;  // [batch], each >= 1 and below the caches' capacity
  Rows y;
};

}  // namespace sisa
