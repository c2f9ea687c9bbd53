// Causal attention with a bias of decay, made tile by tile: parameters of its kernels. Plain data, as in sisa.h.
#pragma once

#include <cstdint>

#include "sisa.h"

namespace sisa {

// What a score has beside q_i . k_j / sqrt(head_width), with g and phase the running sums of log_decay and theta:
enum class Bias : int32_t {
  none,
  importance,  // lam e^(g_i - g_j) (R(phase_i) c_i) . (R(phase_j) b_j): SISA; log_decay [batch, keys, key_heads]
  forget,      // g_i - g_j: FoX, ALiBi; log_decay [batch, keys, heads]
};

// Rows are [batch, tokens, heads or key heads, channels]; those of queries have `queries` tokens, query i being token offset +
// i of the `keys` tokens of all others. Query head h reads key head h / (heads / key_heads). Widths are at most 256.
struct AttentionParams {
  int64_t batch, queries, keys, offset, heads, key_heads, head_width, value_width;
  int64_t state_width;  // even
  Bias bias;
  Rows q, k, v;
  Rows b, c, theta;           // importance alone
  Rows log_decay;             // fp32, one channel
  Rows cos, sin;              // rotary tables [keys, head_width / 2] fp32 for q and k, or null
  const float* lam;           // [heads] >= 0; importance alone
  const int64_t* bounds;      // [segments + 1], not falling: documents, in each of which all starts anew; null: one of all keys
  int64_t segments;
  Rows y;                     // zero for queries of no document
  bool bf16_products;         // may products' operands be rounded to bf16? For the CPUs that have such products
  float* lse;                 // [batch, heads, queries]: logarithm of the sum of e^score; -inf for queries of no document
};

// y and lse are the forward's. A gradient whose pointer is null is not wanted.
struct AttentionBackwardParams : AttentionParams {
  Rows dy;
  const float* dlse;                   // as lse, or null
  Rows dq, dk, dv, db, dc;
  float *dlog_decay, *dtheta, *dlam;  // contiguous, of the shapes of log_decay, theta and lam
};

}  // namespace sisa
