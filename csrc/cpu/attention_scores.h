// Scores of a pair of tiles, made block by block in registers.
#pragma once

#include <cmath>

#include "attention_tiles.h"

namespace sisa::cpu::SISA_ISA {

constexpr float kMasked = -1e30f;  // finite, so that less the largest it is a number; exp of it is 0

// e^x of x <= 88, as a score less another: of the rounding in x log2 e nothing is seen where e^x is not small.
SISA_INLINE Vec weight(Vec x) {
  return pow2(x * 1.44269504f);
}

// What scores of a tile of queries with a tile of keys are made of.
struct Pair {
  const float *q, *k_t;
  int64_t q_width, k_depth;
  const float *c, *b_t;  // importance; b_t is null past the horizon
  int64_t c_width, b_depth;
  const float *query_gate, *key_gate;  // Gates
  const float *high, *low;
  float factor;  // of the bias. importance: e^(g_I - g_J), forget: g_I - g_J
  float lam;
};

// g_i - g_j within a tile, from g in two parts so that few digits cancel; 0 for later keys. Lets a NaN through.
SISA_INLINE Vec gap(const Pair& x, int64_t row, int64_t column) {
  const Vec high = broadcast(x.high[row]) - load(x.high + column), low = broadcast(x.low[row]) - load(x.low + column);
  return minimum(broadcast(0), high + low);
}

// e^(g_i - g_j) of the pair's importance.
template <bool kDiagonal>
SISA_INLINE Vec decay(const Pair& x, int64_t row, int64_t column) {
  if constexpr (kDiagonal) return weight(gap(x, row, column));
  return broadcast(x.factor * x.query_gate[row]) * load(x.key_gate + column);
}

// The lanes of x that belong to keys up to the row's token, `other` in the rest.
SISA_INLINE Vec causal(Vec x, Vec other, int64_t row, int64_t column) {
  Int lane;
  for (int64_t i = 0; i < V; ++i) lane[i] = static_cast<int32_t>(i);
  return lane <= static_cast<int32_t>(row - column) ? x : other;
}

// Calls body(row, column, R, N) over the blocks of a pair's scores; on the diagonal over those that have keys up to some row.
template <bool kDiagonal, class F>
SISA_INLINE void for_score_blocks(Span rows, F body) {
  constexpr int N = !kDiagonal ? kColumns : V == 16 ? 1 : 2;
  for (int64_t column = 0; column < (kDiagonal ? rows.end : kTile); column += N * V) {
    const Span below{kDiagonal ? std::max(rows.begin, column) : rows.begin, rows.end};
    for_blocks<kBlockRows<N>>(below, [&]<int R>(int64_t row, std::integral_constant<int, R> r) __attribute__((always_inline)) {
      body(row, column, r, std::integral_constant<int, N>());
    });
  }
}

template <Bias kBias, bool kDiagonal, class Number = Single, int R, int N>
SISA_INLINE void score_block(const Pair& x, int64_t row, int64_t column, Vec (&acc)[R][N]) {
  // Summed apart: many small terms of q.k added to a large bias would each be rounded like it.
  Vec bias[R][N] = {};
  if constexpr (kBias == Bias::importance) {
    if (x.b_t) {
      accumulate<false, Number>(bias, x.c + row * x.c_width, x.c_width, x.b_t + column, kTile, {0, x.b_depth});
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) bias[r][n] *= decay<kDiagonal>(x, row + r, column + n * V) * x.lam;
      }
    }
  }
  accumulate<false, Number>(acc, x.q + row * x.q_width, x.q_width, x.k_t + column, kTile, {0, x.k_depth});
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const int64_t i = row + r, j = column + n * V;
      if constexpr (kBias == Bias::importance) acc[r][n] += bias[r][n];
      if constexpr (kBias == Bias::forget) {
        acc[r][n] += kDiagonal ? gap(x, i, j) : broadcast(x.query_gate[i] + x.factor) + load(x.key_gate + j);
      }
      if constexpr (kDiagonal) acc[r][n] = causal(acc[r][n], broadcast(kMasked), i, j);
    }
  }
}

// The pair of a tile of queries with whatever keys pair_with then sets.
inline Pair pair_of(const AttentionParams& p, const Keys& keys, const Gates& gates, int64_t tile, int64_t head, const float* q,
                    const float* c) {
  Pair x{};
  x.q = q, x.q_width = keys.q_width, x.k_depth = keys.k_depth;
  x.c = c, x.c_width = keys.c_width, x.b_depth = keys.b_depth;
  x.query_gate = gates.query + tile * kTile, x.high = gates.high + tile * kTile, x.low = gates.low + tile * kTile;
  x.lam = p.bias == Bias::importance ? p.lam[head] : 0;
  return x;
}

// Sets the tile of keys. False if all weights are 0, with nothing there that is not finite, so that the pair changes nothing.
// query_norm is largest_query_norm; the weights are exp of a score less what is at least `least`.
//
// Importance is left out past the horizon, where it is below what rounding hides of a score, and of the gradients, too: norms
// and lam count as 1 at least.
template <Bias kBias>
bool pair_with(
    Pair& x, const Keys& keys, const Gates& gates, int64_t query_tile, int64_t key_tile, float query_norm, float least) {
  x.k_t = keys.k_t + key_tile * kTile * x.k_depth;
  if constexpr (kBias == Bias::none) return true;
  x.key_gate = gates.key + key_tile * kTile;
  const bool diagonal = query_tile == key_tile;
  const double gap = gates.first[query_tile] - gates.last[key_tile];
  if constexpr (kBias == Bias::importance) {
    constexpr float kHorizon = 0x1p-24f;
    x.factor = diagonal ? 1 : static_cast<float>(std::exp(gap));
    const bool vanishes = x.factor * std::max(1.0f, x.lam) * query_norm * keys.norm[key_tile] < kHorizon;
    x.b_t = diagonal || !vanishes ? keys.b_t + key_tile * kTile * x.b_depth : nullptr;
    return true;
  } else {
    constexpr float kNoWeight = -106;  // exp of it is 0, with some room
    x.factor = static_cast<float>(gap);
    return diagonal || !(x.factor + 1.001f * query_norm * keys.norm[key_tile] < least + kNoWeight);
  }
}

}  // namespace sisa::cpu::SISA_ISA
