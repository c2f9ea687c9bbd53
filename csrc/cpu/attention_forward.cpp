// The forward: a tile of queries at a time walks over its keys, from the diagonal back, with a running softmax.
#include <cmath>
#include <limits>

#include "attention_scores.h"

namespace sisa::cpu::SISA_ISA {

namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr float kRise = 5;  // by which scores may pass a row's pivot: weights up to e^5 lose nothing

// One tile of queries under way. Of Pairs, the weights are rows of bf16.
template <class Number>
struct Walk {
  using Weight = std::conditional_t<Number::kNumbers == 2, BFloat16, float>;

  Walk() = default;
  Walk(Arena& arena, const Keys& keys) : width(keys.v_width) {
    q = arena.take<float>(kTile * keys.k_width), c = arena.take<float>(kTile * keys.b_width);
    y = arena.take<float>(kTile * width), weights = arena.take<Weight>(kTile * kTile), sums = arena.take<float>(kTile * V);
    pivot = arena.take<float>(kTile);
  }

  void start() {
    std::memset(y, 0, kTile * width * sizeof(float)), std::memset(sums, 0, kTile * V * sizeof(float));
    for (int64_t i = 0; i < kTile; ++i) pivot[i] = kNever;
  }

  float least_pivot(Span rows) const {
    float least = pivot[rows.begin];
    for (int64_t i = rows.begin; i < rows.end; ++i) least = std::min(least, pivot[i]);
    return least;
  }

  // Raises the pivots that scores pass by too much to the largest of them, given by row, and brings to it what these rows have
  // so far, `column` weights of this tile too. Apart, since inside of soften it halves the speed of the rest.
  __attribute__((noinline)) void raise(const Vec* most_by_lane, int64_t rows, int64_t row, int64_t column) {
    for (int64_t end = row + rows; row < end; ++row) {
      const float most = largest(*most_by_lane++);
      if (!(most > pivot[row] + kRise)) continue;
      const float before = pivot[row];
      pivot[row] = most;
      if (before == kNever) continue;  // nothing yet
      const float factor = std::exp(before - most);
      for (int64_t i = 0; i < width; i += V) store(load(y + row * width + i) * factor, y + row * width + i);
      for (int64_t i = 0; i < column; i += V) store(load(weights + row * kTile + i) * factor, weights + row * kTile + i);
      store(load(sums + row * V) * factor, sums + row * V);
    }
  }

  // Scores to weights e^(score - pivot), and their sums, kept a lane.
  template <int R, int N>
  SISA_INLINE void soften(Vec (&acc)[R][N], int64_t row, int64_t column) {
    Weight* const to = weights + row * kTile + column;
    float *const totals = sums + row * V, *const pivots = pivot + row;
    bool rises = false;
    Vec most[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      most[r] = acc[r][0];
#pragma GCC unroll 16
      for (int n = 1; n < N; ++n) most[r] = maximum(most[r], acc[r][n]);
      rises |= any_above(most[r], broadcast(pivots[r] + kRise));
    }
    if (__builtin_expect(rises, 0)) {
      Vec passed[R];  // so that `most` itself stays in registers
      std::copy(most, most + R, passed);
      raise(passed, R, row, column);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec total = load(totals + r * V);
      const Vec from = broadcast(pivots[r]);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        acc[r][n] = weight(acc[r][n] - from);
        if constexpr (Number::kNumbers == 1) store(acc[r][n], to + r * kTile + n * V);
      }
      if constexpr (Number::kNumbers == 2) store_row<N>(acc[r], to + r * kTile);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) total += acc[r][n];
      store(total, totals + r * V);
    }
  }

  template <Bias kBias, bool kDiagonal>
  __attribute__((noinline)) void step(const Pair& pair, const float* v, Span rows) {
    for_score_blocks<kDiagonal>(rows, [&]<int R, int N>(int64_t row, int64_t column, std::integral_constant<int, R>,
                                                        std::integral_constant<int, N>) __attribute__((always_inline)) {
      Vec acc[R][N] = {};
      score_block<kBias, kDiagonal, Number>(pair, row, column, acc);
      soften(acc, row, column);
    });
    product<false, kDiagonal ? Part::lower : Part::whole, Number>(
        reinterpret_cast<const float*>(weights), v, width, rows, {0, kTile / Number::kNumbers}, 1, y);
  }

  void finish(const AttentionParams& p, const Tile& tile, int64_t batch, int64_t head) const {
    for (int64_t i = tile.rows.begin; i < tile.rows.end; ++i) {
      const int64_t query = tile.begin + i - p.offset;
      const float total = sum(load(sums + i * V)), scale = 1 / total;
      float* row = y + i * width;
      for (int64_t n = 0; n < width; n += V) store(load(row + n) * scale, row + n);
      write_row(row, p.y, batch, query, head, p.value_width);
      p.lse[(batch * p.heads + head) * p.queries + query] = pivot[i] + std::log(total);
    }
  }

  int64_t width;
  float *q, *c, *y, *sums, *pivot;
  Weight* weights;
};

template <Bias kBias, class Number>
void attend(const AttentionParams& p, const Tiles& tiles, const Keys& keys, const Gates& gates, int64_t batch, int64_t head,
            int64_t index) {
  const Tile& tile = tiles[index];
  Scratched<Walk<Number>> walk(Use::tile, keys);
  pack_queries(p, tile, index, keys, batch, head, walk->q, walk->c);
  walk->start();
  Pair pair = pair_of(p, keys, gates, index, head, walk->q, walk->c);
  const float norm = largest_query_norm(p, tile, index, keys, gates, walk->q, walk->c);
  if constexpr (Number::kNumbers == 2) {
    pair_channels(walk->q, keys.k_width, tile.rows, walk->q), pair_channels(walk->c, keys.b_width, tile.rows, walk->c);
  }
  for (int64_t j = index; j >= tile.first; --j) {
    const float least = kBias == Bias::forget ? walk->least_pivot(tile.rows) : 0;
    if (!pair_with<kBias>(pair, keys, gates, index, j, norm, least)) continue;
    const float* v = keys.v + j * kTile / Number::kNumbers * keys.v_width;
    if (j < index) {
      walk->template step<kBias, false>(pair, v, tile.rows);
    } else {
      walk->template step<kBias, true>(pair, v, tile.rows);
    }
  }
  walk->finish(p, tile, batch, head);
}

// Queries of no document.
void write_nothing(const AttentionParams& p, const Tile& tile, int64_t batch, int64_t head) {
  for (int64_t i = tile.rows.begin; i < tile.rows.end; ++i) {
    const int64_t query = tile.begin + i - p.offset;
    write_zeros(p.y, batch, query, head, p.value_width);
    p.lse[(batch * p.heads + head) * p.queries + query] = kNever;
  }
}

struct Unit {
  Unit() = default;
  Unit(Arena& arena, const AttentionParams& p, const Tiles& tiles, bool paired)
      : gates(arena, tiles), keys(arena, p, tiles, false, paired) {}
  Gates gates;
  Keys keys;
};

// All query heads of one key head.
template <Bias kBias, class Number>
void attend_with_key_head(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t key_head) {
  Scratched<Unit> unit(Use::head, p, tiles, Number::kNumbers == 2);
  Gates& gates = unit->gates;
  Keys& keys = unit->keys;
  pack_keys(p, tiles, batch, key_head, gates, keys);
  const int64_t shared_by = p.heads / p.key_heads;
  for (int64_t head = key_head * shared_by; head < (key_head + 1) * shared_by; ++head) {
    if (kBias == Bias::forget) gates.fill(p, tiles, batch, head);
    for_each_free(tiles.size(), [&](int64_t i) {
      const int64_t index = tiles.size() - 1 - i;  // the longest walks first
      const Tile& tile = tiles[index];
      if (tile.rows.begin == tile.rows.end) return;
      if (tiles.attended(index)) {
        attend<kBias, Number>(p, tiles, keys, gates, batch, head, index);
      } else {
        write_nothing(p, tile, batch, head);
      }
    });
  }
}

template <Bias kBias, class Number>
void attend_all(const AttentionParams& p) {
  const Tiles tiles(p);
  for_heads(p.batch * p.key_heads, tiles.size() / 4, [&](int64_t i, bool) {
    attend_with_key_head<kBias, Number>(p, tiles, i / p.key_heads, i % p.key_heads);
  });
}

template <class Number>
void attend_all(const AttentionParams& p) {
  switch (p.bias) {
    case Bias::none: return attend_all<Bias::none, Number>(p);
    case Bias::importance: return attend_all<Bias::importance, Number>(p);
    case Bias::forget: return attend_all<Bias::forget, Number>(p);
  }
}

}  // namespace

void attention(const AttentionParams& p) {
  return kHasPairs && p.bf16_products ? attend_all<Pairs>(p) : attend_all<Single>(p);
}

}  // namespace sisa::cpu::SISA_ISA
