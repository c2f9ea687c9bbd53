// The backward, in one pass over the pairs of tiles: groups of key tiles outside, query tiles inside from the last to the
// diagonal.
//
// Groups are dealt to lanes, which may run side by side: gradients of keys are a group's own, those of queries are summed by
// lane and then over the lanes in order. The number of lanes is a matter of shape alone: bits do not depend on threads.
//
// A token's pair with itself is kept apart ("own"). It has no part in the gradients of decay and phase, which would have to
// cancel; and the gradient of its score is taken from those of the row's others where its weight is the larger part: the sum of
// all is known, dlse, and none of the others' digits cancel.
#include <cmath>
#include <limits>

#include "attention_scores.h"

namespace sisa::cpu::SISA_ISA {

namespace {

constexpr int64_t kGroup = 4;         // key tiles that share a walk over the queries
constexpr int64_t kTilesOfLane = 16;  // at least
constexpr int64_t kMostLanes = 8;

// Which products anyone wants.
struct Wanted {
  explicit Wanted(const AttentionBackwardParams& p) {
    const bool importance = p.bias == Bias::importance;
    q = p.dq.data, k = p.dk.data, v = p.dv.data;
    flux = p.bias != Bias::none && p.dlog_decay;
    phase = importance && p.dtheta;
    c = importance && (p.dc.data || p.dlam || flux || phase);
    b = importance && (p.db.data || flux || phase);
    scores = q || k || c || b || flux;
  }
  bool q, k, v, c, b, flux, phase;
  bool scores;  // the gradient of the scores, which all but v need
};

// Sums of one lane over its groups, in the packed queries' layout.
struct Lane {
  Lane() = default;
  Lane(Arena& arena, const Keys& keys, int64_t tokens)
      : q_size(tokens * keys.k_width), c_size(tokens * keys.b_width), scores_size(tokens) {
    q = arena.take<float>(q_size), c = arena.take<float>(c_size), scores = arena.take<double>(scores_size);
  }
  void clear() {
    std::memset(q, 0, q_size * sizeof(float)), std::memset(c, 0, c_size * sizeof(float));
    std::memset(scores, 0, scores_size * sizeof(double));
  }
  int64_t q_size, c_size, scores_size;
  float *q, *c;
  double* scores;  // gradients of a query's scores, but for its own
};

// All that one key head, and one query head after another, keeps for all tokens.
struct Unit {
  Unit() = default;
  Unit(Arena& arena, const AttentionBackwardParams& p, const Tiles& tiles, int64_t lane_count, bool paired)
      : gates(arena, tiles), keys(arena, p, tiles, true, paired), lanes(lane_count) {
    const int64_t tokens = tiles.size() * kTile;
    q = arena.take<float>(tokens * keys.k_width), c = arena.take<float>(tokens * keys.b_width);
    dy = arena.take<float>(tokens * keys.dy_width), delta = arena.take<float>(tokens);
    q_left = q_right = q, c_left = c_right = c, dy_right = dy;
    if (paired) {
      q_left = arena.take<float>(tokens * keys.q_width), c_left = arena.take<float>(tokens * keys.c_width);
      q_right = arena.take<float>(tokens / 2 * keys.k_width), c_right = arena.take<float>(tokens / 2 * keys.b_width);
      dy_right = arena.take<float>(tokens / 2 * keys.v_width);
    }
    lse = arena.take<float>(tokens);
    own_weight = arena.take<float>(tokens), norm = arena.take<float>(tiles.size());
    least = arena.take<float>(tiles.size()), lam_parts = arena.take<double>(tiles.size());
    for (int64_t i = 0; i < lanes; ++i) lane[i] = Lane(arena, keys, tokens);
    dk = arena.take<float>(tokens * keys.k_width), dv = arena.take<float>(tokens * keys.v_width);
    db = arena.take<float>(tokens * keys.b_width), own = arena.take<float>(tokens * (p.heads / p.key_heads));
    flux = arena.take<double>(tokens), phase_flux = arena.take<double>(tokens * keys.pairs);
  }

  void clear_keys(int64_t tile) {
    const int64_t token = tile * kTile;
    std::memset(dk + token * keys.k_width, 0, kTile * keys.k_width * sizeof(float));
    std::memset(dv + token * keys.v_width, 0, kTile * keys.v_width * sizeof(float));
    std::memset(db + token * keys.b_width, 0, kTile * keys.b_width * sizeof(float));
    std::memset(flux + token, 0, kTile * sizeof(double));
    std::memset(phase_flux + token * keys.pairs, 0, kTile * keys.pairs * sizeof(double));
  }

  Gates gates;
  Keys keys;
  int64_t lanes;
  Lane lane[kMostLanes];
  // Of the query head, [tiles][kTile](channels):
  float *q, *c;
  float *q_left, *c_left, *dy;          // left operands of products
  float *q_right, *c_right, *dy_right;  // right ones, by tokens in Numbers
  float* delta;                         // dy . y - dlse
  float* lse;
  float* own_weight;
  // [tiles]:
  float *norm, *least;  // of pair_with
  double* lam_parts;
  // Of the key head, summed over its query heads:
  float *dk, *dv, *db;        // gradients of the products' operands
  float* own;                 // [query heads][tokens], the gradient of a token's score with itself
  double *flux, *phase_flux;  // dL/dg, dL/dphase
};

// Weights and gradients of a pair's scores, and the gradients' sums over a group of key tiles, by query and lane of a vector.
struct Work {
  Work() = default;
  Work(Arena& arena, bool paired) {
    weights = arena.take<float>(kTile * kTile), d_scores = arena.take<float>(kTile * kTile);
    d_importance = arena.take<float>(kTile * kTile), sums = arena.take<float>(kTile * V);
    weights_by_key = weights, scores_by_query = scores_by_key = d_scores, importance_by_query = importance_by_key = d_importance;
    if (!paired) return;
    for (float** x : {&weights_by_key, &scores_by_query, &scores_by_key, &importance_by_query, &importance_by_key}) {
      *x = arena.take<float>(kTile * kTile / 2);
    }
  }
  float *weights, *d_scores, *d_importance, *sums;
  // As left operands of products: for results by query, and for those by key.
  float *weights_by_key, *scores_by_query, *scores_by_key, *importance_by_query, *importance_by_key;
};

template <Bias kBias, class Number>
class Backward {
  static constexpr bool kPaired = Number::kNumbers == 2;

 public:
  explicit Backward(const AttentionBackwardParams& p)
      : p_(p), wanted_(p), tiles_(p), lanes_(std::clamp<int64_t>(tiles_.size() / kTilesOfLane, 1, kMostLanes)),
        shared_by_(p.heads / p.key_heads), d_lam_(p.batch * p.heads) {}

  void run() {
    for_heads(p_.batch * p_.key_heads, lanes_, [&](int64_t i, bool wide) {
      key_head(i / p_.key_heads, i % p_.key_heads, wide);
    });
    if (kBias != Bias::importance || !p_.dlam) return;
    for (int64_t head = 0; head < p_.heads; ++head) {
      double sum = 0;
      for (int64_t batch = 0; batch < p_.batch; ++batch) sum += d_lam_[batch * p_.heads + head];
      p_.dlam[head] = static_cast<float>(sum);
    }
  }

 private:
  void key_head(int64_t batch, int64_t key_head, bool wide) {
    Scratched<Unit> scratch(Use::head, p_, tiles_, wide ? lanes_ : std::min<int64_t>(lanes_, 2), kPaired);
    Unit& unit = *scratch;
    pack_keys(p_, tiles_, batch, key_head, unit.gates, unit.keys);
    for_each_free(tiles_.size(), [&](int64_t t) { unit.clear_keys(t); });
    for (int64_t head = key_head * shared_by_; head < (key_head + 1) * shared_by_; ++head) {
      query_head(unit, batch, head);
    }
    for_each_free(tiles_.size(), [&](int64_t t) { finish_keys(unit, batch, key_head, t); });
    if (kBias == Bias::importance && wanted_.flux) write_decay(unit.flux, batch, key_head, p_.key_heads);
    if (kBias == Bias::importance && wanted_.phase) write_theta(unit, batch, key_head);
  }

  void query_head(Unit& unit, int64_t batch, int64_t head) {
    if (kBias == Bias::forget) unit.gates.fill(p_, tiles_, batch, head);
    for_each_free(tiles_.size(), [&](int64_t t) {
      if (has_queries(t)) pack(unit, batch, head, t);
    });
    if (unit.lanes == lanes_) {
      for_each_free(lanes_, [&](int64_t lane) { walk(unit, head, lane, unit.lane[lane]); });
      for (int64_t lane = 1; lane < lanes_; ++lane) add(unit, unit.lane[lane]);
    } else {  // one after another, with room for one beside the sum
      walk(unit, head, 0, unit.lane[0]);
      for (int64_t lane = 1; lane < lanes_; ++lane) walk(unit, head, lane, unit.lane[1]), add(unit, unit.lane[1]);
    }
    for_each_free(tiles_.size(), [&](int64_t t) { finish_queries(unit, batch, head, t); });
    if (kBias == Bias::importance && p_.dlam) {
      double sum = 0;
      for (int64_t t = 0; t < tiles_.size(); ++t) sum += has_queries(t) ? unit.lam_parts[t] : 0;
      d_lam_[batch * p_.heads + head] = sum;
    }
    if (kBias == Bias::forget && wanted_.flux) {
      write_decay(unit.flux, batch, head, p_.heads);
      for_each_free(tiles_.size(), [&](int64_t t) { std::memset(unit.flux + t * kTile, 0, kTile * sizeof(double)); });
    }
  }

  bool has_queries(int64_t t) const { return tiles_.attended(t) && tiles_[t].rows.begin < tiles_[t].rows.end; }

  void pack(Unit& unit, int64_t batch, int64_t head, int64_t t) {
    const Tile& tile = tiles_[t];
    const Keys& keys = unit.keys;
    const int64_t token = t * kTile;
    float *q = unit.q + token * keys.k_width, *c = unit.c + token * keys.b_width, *dy_rows = unit.dy + token * keys.dy_width;
    pack_queries(p_, tile, t, keys, batch, head, q, c);
    unit.norm[t] = largest_query_norm(p_, tile, t, keys, unit.gates, q, c);
    Scratch scratch(Use::tile, kPaired ? kTile * keys.v_width * sizeof(float) : 0);
    if (kPaired) dy_rows = static_cast<float*>(scratch.data());
    unit.least[t] = std::numeric_limits<float>::infinity();
    alignas(64) float spare[kMaxWidth];
    for (int64_t i = tile.rows.begin; i < tile.rows.end; ++i) {
      const int64_t query = tile.begin + i - p_.offset, row = (batch * p_.heads + head) * p_.queries + query;
      float* dy = dy_rows + i * keys.v_width;
      read_row(p_.dy, batch, query, head, p_.value_width, dy);
      const float* y = row_floats(p_.y, batch, query, head, p_.value_width, spare);
      Vec product{};
      for (int64_t n = 0; n < keys.v_width; n += V) product = fma(load(dy + n), load(y + n), product);
      unit.delta[token + i] = sum(product) - (p_.dlse ? p_.dlse[row] : 0);
      unit.lse[token + i] = p_.lse[row];
      const float finite = unit.lse[token + i] + 0 * unit.delta[token + i];  // a NaN where dy, y or lse is not
      if (finite < unit.least[t] || finite != finite) unit.least[t] = finite;
    }
    if constexpr (kPaired) pack_pairs(unit, t, q, c, dy_rows);
  }

  // The tokens whose pairs hold the rows.
  static Span whole_pairs(Span rows) {
    return {rows.begin & -Number::kNumbers, (rows.end + Number::kNumbers - 1) & -Number::kNumbers};
  }

  // A query tile's operands as Pairs. Tokens beside its rows that belong to their pairs get weights and gradients of 0.
  void pack_pairs(Unit& unit, int64_t t, float* q, float* c, float* dy) const {
    const Keys& keys = unit.keys;
    const int64_t token = t * kTile;
    const Span rows = tiles_[t].rows, whole = whole_pairs(rows);
    for (const int64_t row : {whole.begin, whole.end - 1}) {
      if (rows.begin <= row && row < rows.end) continue;
      unit.delta[token + row] = 0, unit.lse[token + row] = -kMasked;
      std::memset(q + row * keys.k_width, 0, keys.k_width * sizeof(float));
      std::memset(c + row * keys.b_width, 0, keys.b_width * sizeof(float));
      std::memset(dy + row * keys.v_width, 0, keys.v_width * sizeof(float));
    }
    round_rows(q, keys.k_width, whole), round_rows(c, keys.b_width, whole);
    pair_channels(q, keys.k_width, whole, unit.q_left + token * keys.q_width);
    pair_channels(c, keys.b_width, whole, unit.c_left + token * keys.c_width);
    pair_channels(dy, keys.v_width, whole, unit.dy + token * keys.dy_width);
    pair_tokens(q, keys.k_width, whole, unit.q_right + token / 2 * keys.k_width);
    pair_tokens(c, keys.b_width, whole, unit.c_right + token / 2 * keys.b_width);
    pair_tokens(dy, keys.v_width, whole, unit.dy_right + token / 2 * keys.v_width);
  }

  // Adds another lane's sums to the first's.
  void add(Unit& unit, const Lane& other) const {
    for_each_free(tiles_.size(), [&](int64_t t) {
      const Lane& sum = unit.lane[0];
      const auto add_tile = [t](const float* x, int64_t width, float* to) {
        for (int64_t i = t * kTile * width; i < (t + 1) * kTile * width; i += V) store(load(to + i) + load(x + i), to + i);
      };
      add_tile(other.q, unit.keys.k_width, sum.q), add_tile(other.c, unit.keys.b_width, sum.c);
      for (int64_t i = t * kTile; i < (t + 1) * kTile; ++i) sum.scores[i] += other.scores[i];
    });
  }

  // ---- Pairs of tiles -------------------------------------------------------------------------------------------------------

  void walk(Unit& unit, int64_t head, int64_t lane, Lane& sums) {
    Scratched<Work> work(Use::tile, kPaired);
    sums.clear();
    const int64_t groups = (tiles_.size() + kGroup - 1) / kGroup;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t turn = group % (2 * lanes_);  // there and back, for lanes of about the same work
      if (lane != (turn < lanes_ ? turn : 2 * lanes_ - 1 - turn)) continue;
      const int64_t begin = group * kGroup, end = std::min(begin + kGroup, tiles_.size());
      int64_t queries_end = 0;
      for (int64_t j = begin; j < end; ++j) queries_end = std::max(queries_end, tiles_[j].end);
      for (int64_t i = queries_end - 1; i >= begin; --i) {
        if (!has_queries(i)) continue;
        const int64_t token = i * kTile;
        std::memset(work->sums, 0, kTile * V * sizeof(float));
        Pair pair = pair_of(
            p_, unit.keys, unit.gates, i, head, unit.q_left + token * unit.keys.q_width, unit.c_left + token * unit.keys.c_width);
        for (int64_t j = std::max(begin, tiles_[i].first); j < std::min(end, i + 1); ++j) {
          if (!pair_with<kBias>(pair, unit.keys, unit.gates, i, j, unit.norm[i], unit.least[i])) continue;
          if (j < i) {
            step<false>(unit, sums, *work, pair, head, i, j);
          } else {
            step<true>(unit, sums, *work, pair, head, i, j);
          }
        }
        for (int64_t n = tiles_[i].rows.begin; n < tiles_[i].rows.end; ++n) {
          sums.scores[token + n] += sum(load(work->sums + n * V));
        }
      }
    }
  }

  template <bool kDiagonal>
  __attribute__((noinline)) void step(
      Unit& unit, Lane& lane, Work& work, const Pair& pair, int64_t head, int64_t i, int64_t j) {
    constexpr Part by_query = kDiagonal ? Part::lower : Part::whole, by_key = kDiagonal ? Part::upper : Part::whole;
    const Keys& keys = unit.keys;
    const Span rows = tiles_[i].rows, all{0, kDiagonal ? rows.end : kTile}, whole = whole_pairs(rows);
    const Span by_rows = in_numbers(rows), by_all = in_numbers(all);  // as depths
    const int64_t query = i * kTile, key = j * kTile;
    const int64_t right_query = query / Number::kNumbers, right_key = key / Number::kNumbers;
    const float *dy = unit.dy + query * keys.dy_width, *delta = unit.delta + query, *lse = unit.lse + query;
    const float* v_t = keys.v_t + key * keys.v_depth;
    const bool importance = kBias == Bias::importance && pair.b_t && (wanted_.b || wanted_.c);

    for_score_blocks<kDiagonal>(whole, [&]<int R, int N>(int64_t row, int64_t column, std::integral_constant<int, R>,
                                                         std::integral_constant<int, N>) __attribute__((always_inline)) {
      Vec acc[R][N] = {};
      score_block<kBias, kDiagonal, Number>(pair, row, column, acc);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) acc[r][n] = weight(acc[r][n] - broadcast(lse[row + r]));
      }
      if (kPaired && kDiagonal) clear_beside(rows, row, acc);
      put(acc, row, column, work.weights);
      if constexpr (kPaired) put_pairs(acc, row, column, nullptr, work.weights_by_key);
    });
    if (wanted_.v) {
      product<true, by_key, Number>(
          work.weights_by_key, unit.dy_right + right_query * keys.v_width, keys.v_width, all, by_rows, 1,
          unit.dv + key * keys.v_width);
    }
    if (!wanted_.scores) return;

    for_score_blocks<kDiagonal>(whole, [&]<int R, int N>(int64_t row, int64_t column, std::integral_constant<int, R>,
                                                         std::integral_constant<int, N>) __attribute__((always_inline)) {
      Vec acc[R][N] = {};
      accumulate<false, Number>(acc, dy + row * keys.dy_width, keys.dy_width, v_t + column, kTile, {0, keys.v_depth});
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        Vec total = load(work.sums + (row + r) * V);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          const int64_t at = (row + r) * kTile + column + n * V;
          acc[r][n] = load(work.weights + at) * (acc[r][n] - broadcast(delta[row + r]));
          if (!kPaired || kDiagonal || kBias == Bias::forget) store(acc[r][n], work.d_scores + at);
          total += acc[r][n];
        }
        if (!kDiagonal) store(total, work.sums + (row + r) * V);
      }
      if (kPaired && kDiagonal) clear_beside(rows, row, acc);
      if constexpr (kPaired) put_pairs(acc, row, column, work.scores_by_query, work.scores_by_key);
      if constexpr (kBias == Bias::importance) {
        if (importance) {
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) acc[r][n] *= decay<kDiagonal>(pair, row + r, column + n * V);
          }
          if constexpr (kPaired) {
            if (kDiagonal) clear_beside(rows, row, acc);
            put_pairs(acc, row, column, work.importance_by_query, work.importance_by_key);
          } else {
            put(acc, row, column, work.d_importance);
          }
        }
      }
    });
    if (kDiagonal) {
      float* own = own_of(unit, head) + query;
      for (int64_t n = rows.begin; n < rows.end; ++n) {
        unit.own_weight[query + n] = work.weights[n * kTile + n], own[n] = work.d_scores[n * kTile + n];
        work.d_scores[n * kTile + n] = work.d_importance[n * kTile + n] = 0;
        if constexpr (kPaired) {
          const int64_t by_query = n * kTile + n, by_key = (n / 2 * kTile + n) * 2 + n % 2;
          for (float* x : {work.scores_by_query, work.importance_by_query}) reinterpret_cast<BFloat16*>(x)[by_query] = {};
          for (float* x : {work.scores_by_key, work.importance_by_key}) reinterpret_cast<BFloat16*>(x)[by_key] = {};
        }
      }
    }
    if (kDiagonal || kBias == Bias::forget) add_sums<kDiagonal>(work, rows, unit.flux + key);
    if (wanted_.k) {
      product<true, by_key, Number>(
          work.scores_by_key, unit.q_right + right_query * keys.k_width, keys.k_width, all, by_rows, 1,
          unit.dk + key * keys.k_width);
    }
    if (wanted_.q) {
      product<false, by_query, Number>(
          work.scores_by_query, keys.k_right + right_key * keys.k_width, keys.k_width, rows, by_all, 1,
          lane.q + query * keys.k_width);
    }
    if (!importance) return;
    if (wanted_.b) {
      product<true, by_key, Number>(
          work.importance_by_key, unit.c_right + right_query * keys.b_width, keys.b_width, all, by_rows, p_.lam[head],
          unit.db + key * keys.b_width);
    }
    if (wanted_.c) {
      product<false, by_query, Number>(
          work.importance_by_query, keys.b_right + right_key * keys.b_width, keys.b_width, rows, by_all, 1,
          lane.c + query * keys.b_width);
    }
  }

  static Span in_numbers(Span x) { return {x.begin / Number::kNumbers, (x.end + Number::kNumbers - 1) / Number::kNumbers}; }

  // Rows that only complete a pair count as 0: on the diagonal keys may be theirs alone, and not numbers.
  template <int R, int N>
  SISA_INLINE static void clear_beside(Span rows, int64_t row, Vec (&x)[R][N]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (rows.begin <= row + r && row + r < rows.end) continue;
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) x[r][n] = Vec{};
    }
  }

  template <int R, int N>
  SISA_INLINE static void put(const Vec (&x)[R][N], int64_t row, int64_t column, float* to) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) store(x[r][n], to + (row + r) * kTile + column + n * V);
    }
  }

  // by_query may be null.
  template <int R, int N>
  SISA_INLINE static void put_pairs(const Vec (&x)[R][N], int64_t row, int64_t column, float* by_query, float* by_key) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      if (by_query) store_row<N>(x[r], reinterpret_cast<BFloat16*>(by_query) + (row + r) * kTile + column);
      if (r % 2 != 0) continue;
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) {
        store(zipped(x[r][n], r + 1 < R ? x[r + 1][n] : Vec{}), by_key + (row + r) / 2 * kTile + column + n * V);
      }
    }
  }

  float* own_of(const Unit& unit, int64_t head) const { return unit.own + (head % shared_by_) * tiles_.size() * kTile; }

  // What is left of the sums of scores' gradients: by query on the diagonal; forget: by key, taken from dL/dg.
  template <bool kDiagonal>
  static void add_sums(const Work& work, Span rows, double* flux) {
    Vec by_key[kTile / V] = {};
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Vec total = load(work.sums + row * V);
#pragma GCC unroll 16
      for (int64_t n = 0; n < kTile; n += V) {
        Vec x = load(work.d_scores + row * kTile + n);
        if (kDiagonal) x = causal(x, Vec{}, row, n), total += x;
        by_key[n / V] += x;
      }
      store(total, work.sums + row * V);
    }
    for (int64_t n = 0; n < kTile && kBias == Bias::forget; ++n) flux[n] -= by_key[n / V][n % V];
  }

  // ---- What a head's gradients become ---------------------------------------------------------------------------------------

  void finish_queries(Unit& unit, int64_t batch, int64_t head, int64_t t) {
    const Tile& tile = tiles_[t];
    const Keys& keys = unit.keys;
    const bool attended = has_queries(t);
    const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p_.head_width)));
    double lam_part = 0;
    for (int64_t i = tile.rows.begin; i < tile.rows.end; ++i) {
      const int64_t at = t * kTile + i, token = tile.begin + i, query = token - p_.offset;
      if (!attended) {
        if (wanted_.q) write_zeros(p_.dq, batch, query, head, p_.head_width);
        if (kBias == Bias::importance && p_.dc.data) write_zeros(p_.dc, batch, query, head, p_.state_width);
        continue;
      }
      if (wanted_.scores) set_own(unit, batch, head, at, query);
      if (wanted_.q) {
        float* row = unit.lane[0].q + at * keys.k_width;
        rope_row<true>(p_, token, row, scale, row);
        write_row(row, p_.dq, batch, query, head, p_.head_width);
      }
      if (kBias == Bias::forget) unit.flux[at] += unit.lane[0].scores[at];
      if (wanted_.c) lam_part += finish_c(unit, batch, head, at, query);
    }
    unit.lam_parts[t] = lam_part;
  }

  // Settles the gradient of a query's score with itself, and adds it to those of q and k.
  void set_own(Unit& unit, int64_t batch, int64_t head, int64_t at, int64_t query) {
    float& own = own_of(unit, head)[at];
    const double all = p_.dlse ? p_.dlse[(batch * p_.heads + head) * p_.queries + query] : 0;
    if (unit.own_weight[at] > 0.5f) own = static_cast<float>(all - unit.lane[0].scores[at]);
    for (int64_t n = at * unit.keys.k_width; n < (at + 1) * unit.keys.k_width; n += V) {
      store(fma(broadcast(own), load(unit.keys.k + n), load(unit.lane[0].q + n)), unit.lane[0].q + n);
      store(fma(broadcast(own), load(unit.q + n), load(unit.dk + n)), unit.dk + n);
    }
  }

  // Returns the query's part of dL/dlam.
  double finish_c(Unit& unit, int64_t batch, int64_t head, int64_t at, int64_t query) {
    const Keys& keys = unit.keys;
    const float lam = p_.lam[head], own = own_of(unit, head)[at];
    const float *c = unit.c + at * keys.b_width, *b = keys.b + at * keys.b_width;
    float* row = unit.lane[0].c + at * keys.b_width;
    Dot others, self;
    for (int64_t n = 0; n < keys.b_width; n += V) {
      const Vec x = load(c + n), dx = load(row + n);
      others.add(x, dx), self.add(x, load(b + n));
      if (wanted_.phase) add_even(d_phase(x, partners(x), dx, partners(dx)) * lam, unit.phase_flux + at * keys.pairs + n / 2);
      store(fma(broadcast(own), load(b + n), dx), row + n);
    }
    unit.flux[at] += lam * others.total();
    if (p_.dc.data) {
      rotate_row<true>(row, keys.cos + at * keys.pairs, keys.sin + at * keys.pairs, keys.b_width, lam, row);
      write_row(row, p_.dc, batch, query, head, p_.state_width);
    }
    return others.total() + own * self.total();
  }

  void finish_keys(Unit& unit, int64_t batch, int64_t head, int64_t t) {
    const Tile& tile = tiles_[t];
    const Keys& keys = unit.keys;
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t at = t * kTile + i, token = tile.begin + i;
      float *dk = unit.dk + at * keys.k_width, *dv = unit.dv + at * keys.v_width;
      if (!tiles_.attended(t)) {
        if (wanted_.k) write_zeros(p_.dk, batch, token, head, p_.head_width);
        if (wanted_.v) write_zeros(p_.dv, batch, token, head, p_.value_width);
        if (kBias == Bias::importance && p_.db.data) write_zeros(p_.db, batch, token, head, p_.state_width);
        continue;
      }
      if (wanted_.k) {
        rope_row<true>(p_, token, dk, 1, dk);
        write_row(dk, p_.dk, batch, token, head, p_.head_width);
      }
      if (wanted_.v) write_row(dv, p_.dv, batch, token, head, p_.value_width);
      if (wanted_.b) finish_b(unit, batch, head, at, token);
    }
  }

  void finish_b(Unit& unit, int64_t batch, int64_t key_head, int64_t at, int64_t token) {
    const int64_t query = token - p_.offset;
    if (query >= p_.queries) {  // seen by no query: what is no number in it must not enter the sums below
      if (p_.db.data) write_zeros(p_.db, batch, token, key_head, p_.state_width);
      return;
    }
    const Keys& keys = unit.keys;
    const float* b = keys.b + at * keys.b_width;
    float* row = unit.db + at * keys.b_width;
    Dot others;
    for (int64_t n = 0; n < keys.b_width; n += V) {
      const Vec x = load(b + n), dx = load(row + n);
      others.add(x, dx);
      if (wanted_.phase) add_even(d_phase(x, partners(x), dx, partners(dx)), unit.phase_flux + at * keys.pairs + n / 2);
    }
    unit.flux[at] -= others.total();
    if (!p_.db.data) return;
    rotate_row<true>(row, keys.cos + at * keys.pairs, keys.sin + at * keys.pairs, keys.b_width, 1, row);
    for (int64_t n = 0; n < shared_by_ && query >= 0; ++n) {
      alignas(64) float spare[kMaxWidth];
      const float* c = row_floats(p_.c, batch, query, key_head * shared_by_ + n, p_.state_width, spare);
      const Vec scale = broadcast(p_.lam[key_head * shared_by_ + n] * own_of(unit, n)[at]);
      for (int64_t m = 0; m < keys.b_width; m += V) store(fma(scale, load(c + m), load(row + m)), row + m);
    }
    write_row(row, p_.db, batch, token, key_head, p_.state_width);
  }

  // Reverse running sums over each document.
  void write_decay(const double* flux, int64_t batch, int64_t head, int64_t heads) const {
    double sum = 0;
    for (int64_t t = tiles_.size() - 1; t >= 0; --t) {
      if (t + 1 == tiles_.size() || tiles_[t + 1].first == t + 1) sum = 0;
      for (int64_t i = tiles_[t].count - 1; i >= 0; --i) {
        sum += flux[t * kTile + i];
        p_.dlog_decay[(batch * p_.keys + tiles_[t].begin + i) * heads + head] = static_cast<float>(sum);
      }
    }
  }

  void write_theta(const Unit& unit, int64_t batch, int64_t head) const {
    const int64_t pairs = p_.state_width / 2;
    double sums[kMaxWidth / 2];
    for (int64_t t = tiles_.size() - 1; t >= 0; --t) {
      if (t + 1 == tiles_.size() || tiles_[t + 1].first == t + 1) std::memset(sums, 0, sizeof(sums));
      for (int64_t i = tiles_[t].count - 1; i >= 0; --i) {
        const double* flux = unit.phase_flux + (t * kTile + i) * unit.keys.pairs;
        float* out = p_.dtheta + ((batch * p_.keys + tiles_[t].begin + i) * p_.key_heads + head) * pairs;
        for (int64_t n = 0; n < pairs; ++n) sums[n] += flux[n], out[n] = static_cast<float>(sums[n]);
      }
    }
  }

  const AttentionBackwardParams& p_;
  const Wanted wanted_;
  const Tiles tiles_;
  const int64_t lanes_, shared_by_;
  Buffer<double> d_lam_;  // [batch, heads]
};

template <class Number>
void backward(const AttentionBackwardParams& p) {
  switch (p.bias) {
    case Bias::none: return Backward<Bias::none, Number>(p).run();
    case Bias::importance: return Backward<Bias::importance, Number>(p).run();
    case Bias::forget: return Backward<Bias::forget, Number>(p).run();
  }
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p) {
  return kHasPairs && p.bf16_products ? backward<Pairs>(p) : backward<Single>(p);
}

}  // namespace sisa::cpu::SISA_ISA
