// What forward and backward share: how tokens are cut into tiles, and a head's operands packed by tile.
#pragma once

#include "../attention.h"
#include "../parallel.h"
#include "attention_products.h"
#include "scratch.h"

namespace sisa::cpu::SISA_ISA {

constexpr int64_t kMaxWidth = 256;

SISA_INLINE int64_t padded(int64_t channels) {
  return (channels + V - 1) / V * V;
}

// ---- Memory -----------------------------------------------------------------------------------------------------------------

// Hands out parts of a block of memory, aligned to cache lines; without a block it counts what they take.
class Arena {
 public:
  explicit Arena(void* block) : block_(static_cast<char*>(block)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = block_ ? reinterpret_cast<T*>(block_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* block_;
  int64_t used_ = 0;
};

enum class Use { head, tile };  // of one thread at a time

// Memory that is not zeroed. A thread keeps it for its next call, up to a size: fresh pages cost as much as packing into them.
class Scratch {
 public:
  Scratch(Use use, int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  Use use_;
  void* data_;
};

// A T(arena, arguments...) in scratch.
template <class T>
class Scratched {
 public:
  template <class... Arguments>
  explicit Scratched(Use use, const Arguments&... arguments) : scratch_(use, size(arguments...)) {
    Arena arena(scratch_.data());
    parts_ = T(arena, arguments...);
  }
  T* operator->() { return &parts_; }
  T& operator*() { return parts_; }

 private:
  template <class... Arguments>
  static int64_t size(const Arguments&... arguments) {
    Arena arena(nullptr);
    T(arena, arguments...);
    return arena.used();
  }
  Scratch scratch_;
  T parts_;
};

// ---- Tiles ------------------------------------------------------------------------------------------------------------------

// Up to kTile tokens of one document, or of none.
struct Tile {
  int64_t begin, count;
  int64_t first;  // the first tile of its document
  int64_t end;    // past the last tile of its document that has queries; this tile's keys are attended to from [index, end)
  Span rows;      // of its tokens, those that are queries of this call
};

class Tiles {
 public:
  explicit Tiles(const AttentionParams& p);
  int64_t size() const { return size_; }
  const Tile& operator[](int64_t i) const { return tiles_[i]; }
  bool attended(int64_t i) const { return i < tiles_[i].end; }

 private:
  void add(const AttentionParams& p, int64_t begin, int64_t end, bool document);
  Buffer<Tile> tiles_;
  int64_t size_ = 0;
};

// ---- Rows of channels -------------------------------------------------------------------------------------------------------

// Fetches the row that comes a few tokens later; the address may lie past the tensor.
template <bool kWrite, class T>
SISA_INLINE void prefetch_row(const T* row, int64_t stride, int64_t width) {
  constexpr int64_t kAhead = 6;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(row) + kAhead * stride * sizeof(T);
  for (int64_t i = 0; i < width * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(begin + i), kWrite);
  }
}

// The channels as fp32, zero up to whole vectors.
void read_row(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width, float* out);

// Where they lie as fp32: in the tensor if they do there in whole units, else in `spare`.
template <int64_t kUnit = V>
SISA_INLINE const float* row_floats(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width, float* spare) {
  if (x.dtype == DType::float32 && x.channel == 1 && width % kUnit == 0) {
    const float* row = static_cast<const float*>(x.data) + batch * x.batch + token * x.token + head * x.head;
    prefetch_row<false>(row, x.token, width);
    return row;
  }
  read_row(x, batch, token, head, width, spare);
  return spare;
}

void write_row(const float* in, const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width);
void write_zeros(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width);

// out = scale R(phase) in, or scale R(-phase) in, from the pairs' cosines and sines.
template <bool kBack>
void rotate_row(const float* in, const float* cos, const float* sin, int64_t width, float scale, float* out) {
  for (int64_t i = 0; i < width; i += V) {
    const Vec x = load(in + i), partner = partners(x);
    const Vec c = load_twice(cos + i / 2), s = even_negated(load_twice(sin + i / 2));
    store((kBack ? unrotate(x, partner, c, s) : rotate(x, partner, c, s)) * scale, out + i);
  }
}

// out = scale RoPE(in) or scale RoPE^-1(in) at a position; scale in where there are no tables.
template <bool kBack>
void rope_row(const AttentionParams& p, int64_t token, const float* in, float scale, float* out);

// ---- Packed operands --------------------------------------------------------------------------------------------------------

// The running sum g of one head's log_decay and what scores take from it, by tile. g_I is g at the first token of tile I, g_J
// at the last of tile J: for J < I, g_i - g_j = (g_i - g_I) + (g_I - g_J) + (g_J - g_j), none of them above 0.
struct Gates {
  Gates() = default;
  Gates(Arena& arena, const Tiles& tiles);
  void fill(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t head);

  float *query, *key;    // importance: e^(g_i - g_I), e^(g_J - g_j); forget: the exponents
  float *high, *low;     // g_i - g_I in two parts
  double *first, *last;  // g_I, g_J
};

// The keys of one key head.
struct Keys {
  Keys() = default;
  Keys(Arena& arena, const AttentionParams& p, const Tiles& tiles, bool backward, bool paired);
  // Running sums of theta at the tiles' first tokens; all tiles before pack.
  void sum_phases(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t head);
  void pack(const AttentionParams& p, const Tiles& tiles, int64_t tile, const Gates& gates, int64_t batch, int64_t head);

  bool paired;                               // products are of Pairs
  int64_t k_width, v_width, b_width, pairs;  // padded
  int64_t k_depth, b_depth;                  // channels, in Numbers
  int64_t q_width, c_width, dy_width;        // of rows that are left operands of products, in Numbers
  int64_t v_depth;
  float *k_t, *b_t;                          // [tiles][k_depth or b_depth][kTile]
  float *k, *v, *b;                          // [tiles][kTile][channels]; k and b for the backward, v for the forward; of
                                             // Pairs, v is [tiles][kTile / 2][channels]
  float* v_t;                                // as k_t, for the backward
  float *k_right, *b_right;                  // k and b as right operands of products, by tokens in Numbers
  float *cos, *sin;                          // [tiles][kTile][pairs], of the phases
  float* norm;                               // [tiles], at least 1. importance: the largest |e^(g_J - g_j) b_j|;
                                             // forget: the largest |k_j|, NaN if any of k or v is not finite
  double* phase;                             // [tiles][pairs]
};

// Rows of fp32 to rows of Pairs of channels, padded(width / 2) apart; in may be out.
void pair_channels(const float* in, int64_t width, Span rows, float* out);
// Rows of fp32 to half as many rows of Pairs of tokens; the span is of whole pairs.
void pair_tokens(const float* in, int64_t width, Span rows, float* out);
// Rounds rows to bf16.
void round_rows(float* rows, int64_t width, Span at);

// The queries of one head in one tile, as fp32, with 1 / sqrt(head_width) in q.
void pack_queries(const AttentionParams& p, const Tile& tile, int64_t index, const Keys& keys, int64_t batch, int64_t head,
                  float* q, float* c);

// importance: the largest |e^(g_i - g_I) c_i| of a tile's packed queries, at least 1; forget: the largest |q_i|, likewise. NaN
// if any is.
float largest_query_norm(const AttentionParams& p, const Tile& tile, int64_t index, const Keys& keys, const Gates& gates,
                         const float* q, const float* c);

// Packs the keys of a key head, and for importance fills its gates, over all threads.
void pack_keys(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t key_head, Gates& gates, Keys& keys);

// ---- Threads ----------------------------------------------------------------------------------------------------------------

// Calls body(i) for i < count, each on the next free thread: for parts of unequal length.
template <class F>
void for_each_free(int64_t count, F body) {
  int64_t next = 0;
  parallel_for(0, std::min(count, thread_count()), 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) body(i);
  });
}

// Calls body(i, wide) for i < heads: side by side, or, where that is clearly faster, one after another, each over all threads
// in up to `parts` parts ("wide"). What is computed must not depend on it.
template <class F>
void for_heads(int64_t heads, int64_t parts, F body) {
  const int64_t threads = thread_count(), rounds = (heads + threads - 1) / threads;
  if (4 * heads >= 3 * rounds * std::min(parts, threads)) {
    for_each_free(heads, [&](int64_t i) { body(i, false); });
  } else {
    for (int64_t i = 0; i < heads; ++i) body(i, true);
  }
}

}  // namespace sisa::cpu::SISA_ISA
