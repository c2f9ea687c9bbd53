// Cutting tokens into tiles and packing operands (attention_tiles.h).
#include "attention_tiles.h"

#include <cmath>
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace sisa::cpu::SISA_ISA {

namespace {

constexpr int64_t kKept = 64 << 20;  // bytes a thread keeps between calls, for each use
constexpr int64_t kHugePage = 2 << 20;

struct Kept {
  ~Kept() { std::free(data); }
  void* data = nullptr;
  int64_t size = 0;
};

thread_local Kept kept[2];

template <class F>
void with_row(const Rows& x, int64_t batch, int64_t token, int64_t head, F f) {
  with_type<BFloat16, Half>(x.dtype, [&]<class T>(std::type_identity<T>) {
    f(static_cast<T*>(x.data) + batch * x.batch + token * x.token + head * x.head);
  });
}

// [kTile][width] to [channels][kTile]; width is padded.
void transpose_tile(const float* in, int64_t width, int64_t channels, float* out) {
  for (int64_t row = 0; row < kTile; row += V) {
    for (int64_t i = 0; i < channels; i += V) {
      Vec block[V];
#pragma GCC unroll 16
      for (int64_t r = 0; r < V; ++r) block[r] = load(in + (row + r) * width + i);
      transpose(block);
      const int64_t count = std::min(V, channels - i);
      for (int64_t n = 0; n < count; ++n) store(block[n], out + (i + n) * kTile + row);
    }
  }
}

void zero_rows(float* x, int64_t width, int64_t begin) {
  std::memset(x + begin * width, 0, (kTile - begin) * width * sizeof(float));
}

// The largest |gate_i x_i|, or |x_i| without gates, at least 1; NaN if any is.
float largest_norm(const float* x, int64_t width, const float* gate, int64_t rows) {
  float most = 1;
  for (int64_t row = 0; row < rows; ++row) {
    Vec squares{};
    for (int64_t i = 0; i < width; i += V) squares = fma(load(x + row * width + i), load(x + row * width + i), squares);
    const float square = sum(squares) * (gate ? gate[row] * gate[row] : 1);
    if (square > most || square != square) most = square;
  }
  return std::sqrt(most);
}

}  // namespace

// ---- Memory -----------------------------------------------------------------------------------------------------------------

Scratch::Scratch(Use use, int64_t bytes) : use_(use) {
  Kept& block = kept[static_cast<int>(use)];
  if (block.size < bytes) {
    std::free(block.data);
    block.data = nullptr, block.size = 0;
    const int64_t unit = bytes < kHugePage ? 64 : kHugePage, size = (bytes + unit - 1) / unit * unit;
    block.data = std::aligned_alloc(unit, size);
    if (!block.data) throw std::bad_alloc();
#ifdef __linux__
    if (unit == kHugePage) madvise(block.data, size, MADV_HUGEPAGE);  // fewer faults and misses of the TLB; may fail
#endif
    block.size = size;
  }
  data_ = block.data;
}

Scratch::~Scratch() {
  Kept& block = kept[static_cast<int>(use_)];
  if (block.size <= kKept) return;
  std::free(block.data);
  block.data = nullptr, block.size = 0;
}

// ---- Tiles ------------------------------------------------------------------------------------------------------------------

Tiles::Tiles(const AttentionParams& p) : tiles_(p.keys / kTile + (p.bounds ? p.segments : 1) + 3) {
  int64_t begin = 0;
  for (int64_t n = 0; p.bounds && n <= p.segments; ++n) {
    const int64_t end = std::min(std::max(p.bounds[n], begin), p.keys);
    add(p, begin, end, n > 0);
    begin = end;
  }
  add(p, begin, p.keys, !p.bounds);
}

void Tiles::add(const AttentionParams& p, int64_t begin, int64_t end, bool document) {
  const int64_t first = size_;
  int64_t last = first;
  for (; begin < end; begin += kTile) {
    Tile& tile = tiles_[size_++];
    tile.begin = begin, tile.count = std::min(kTile, end - begin), tile.first = first;
    tile.rows.begin = std::min(std::max<int64_t>(p.offset - begin, 0), tile.count);
    tile.rows.end = std::min(std::max<int64_t>(p.offset + p.queries - begin, 0), tile.count);
    if (document && tile.rows.begin < tile.rows.end) last = size_;
  }
  for (int64_t i = first; i < size_; ++i) tiles_[i].end = last;
}

// ---- Rows of channels -------------------------------------------------------------------------------------------------------

void read_row(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width, float* out) {
  with_row(x, batch, token, head, [&]<class T>(const T* in) {
    if (x.channel == 1) {
      prefetch_row<false>(in, x.token, width);
      for_channels(width, [&](int64_t i, auto count) { store(load(in + i, count), out + i); });
    } else {
      for (int64_t i = 0; i < width; ++i) out[i] = widened(in[i * x.channel]);
      for (int64_t i = width; i < padded(width); ++i) out[i] = 0;
    }
  });
}

void write_row(const float* in, const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width) {
  with_row(x, batch, token, head, [&]<class T>(T* out) {
    if (x.channel == 1) {
      prefetch_row<true>(out, x.token, width);
      for_channels(width, [&](int64_t i, auto count) { store(load(in + i), out + i, count, false); });
    } else {
      for (int64_t i = 0; i < width; ++i) narrow(in[i], out[i * x.channel]);
    }
  });
}

void write_zeros(const Rows& x, int64_t batch, int64_t token, int64_t head, int64_t width) {
  with_row(x, batch, token, head, [&]<class T>(T* out) {
    for (int64_t i = 0; i < width; ++i) narrow(0, out[i * x.channel]);
  });
}

template <bool kBack>
void rope_row(const AttentionParams& p, int64_t token, const float* in, float scale, float* out) {
  const int64_t width = padded(p.head_width);
  if (p.cos.data) {
    alignas(64) float cos[kMaxWidth / 2 + V], sin[kMaxWidth / 2 + V];
    rotate_row<kBack>(in, row_floats<V / 2>(p.cos, 0, token, 0, p.head_width / 2, cos),
                      row_floats<V / 2>(p.sin, 0, token, 0, p.head_width / 2, sin), width, scale, out);
  } else {
    for (int64_t i = 0; i < width; i += V) store(load(in + i) * scale, out + i);
  }
}

template void rope_row<false>(const AttentionParams& p, int64_t token, const float* in, float scale, float* out);
template void rope_row<true>(const AttentionParams& p, int64_t token, const float* in, float scale, float* out);

// ---- Packed operands --------------------------------------------------------------------------------------------------------

Gates::Gates(Arena& arena, const Tiles& tiles) {
  const int64_t tokens = tiles.size() * kTile;
  query = arena.take<float>(tokens), key = arena.take<float>(tokens);
  high = arena.take<float>(tokens), low = arena.take<float>(tokens);
  first = arena.take<double>(tiles.size()), last = arena.take<double>(tiles.size());
}

void Gates::fill(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t head) {
  const float* decays = static_cast<const float*>(p.log_decay.data) + batch * p.log_decay.batch + head * p.log_decay.head;
  double g = 0;
  for (int64_t t = 0; t < tiles.size(); ++t) {
    if (!tiles.attended(t)) continue;
    const Tile& tile = tiles[t];
    if (tile.first == t) g = 0;
    double sums[kTile];
    for (int64_t i = 0; i < kTile; ++i) {
      if (i < tile.count) g += bounded_log_decay(decays[(tile.begin + i) * p.log_decay.token]);
      sums[i] = g;
    }
    first[t] = sums[0], last[t] = g;
    float *queries = query + t * kTile, *keys = key + t * kTile;
    for (int64_t i = 0; i < kTile; ++i) {
      const double from_first = sums[i] - sums[0];
      queries[i] = static_cast<float>(from_first), keys[i] = static_cast<float>(g - sums[i]);
      high[t * kTile + i] = queries[i], low[t * kTile + i] = static_cast<float>(from_first - queries[i]);
    }
    if (p.bias == Bias::forget) continue;
    for (int64_t i = 0; i < kTile; i += V) {
      store(exp(load(queries + i)), queries + i), store(exp(load(keys + i)), keys + i);
    }
  }
}

void pair_channels(const float* in, int64_t width, Span rows, float* out) {
  const int64_t to = padded(width / 2);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < width; i += 2 * V) {
      const float* x = in + row * width + i;
      store(in_a_row(load(x), i + V < width ? load(x + V) : Vec{}), out + row * to + i / 2);
    }
  }
}

void pair_tokens(const float* in, int64_t width, Span rows, float* out) {
  for (int64_t row = rows.begin; row < rows.end; row += 2) {
    for (int64_t i = 0; i < width; i += V) {
      store(zipped(load(in + row * width + i), load(in + (row + 1) * width + i)), out + row / 2 * width + i);
    }
  }
}

void round_rows(float* rows, int64_t width, Span at) {
  for (int64_t i = at.begin * width; i < at.end * width; i += V) store(rounded_to_bf16(load(rows + i)), rows + i);
}

Keys::Keys(Arena& arena, const AttentionParams& p, const Tiles& tiles, bool backward, bool paired_) : paired(paired_) {
  const int64_t n = tiles.size(), tokens = n * kTile;
  const bool importance = p.bias == Bias::importance;
  k_width = padded(p.head_width), v_width = padded(p.value_width), b_width = importance ? padded(p.state_width) : 0;
  pairs = b_width / 2;
  k_depth = paired ? (p.head_width + 1) / 2 : p.head_width, b_depth = importance ? p.state_width / (paired ? 2 : 1) : 0;
  q_width = paired ? padded(k_width / 2) : k_width, c_width = paired ? padded(b_width / 2) : b_width;
  v_depth = paired ? (p.value_width + 1) / 2 : p.value_width, dy_width = paired ? padded(v_width / 2) : v_width;
  k_t = arena.take<float>(tokens * k_depth), b_t = arena.take<float>(tokens * b_depth);
  // A forward needs rows of k and b only on the way to their transposes, and a backward those of v: pack has a tile's place for
  // them.
  k = backward ? arena.take<float>(tokens * k_width) : nullptr;
  b = backward ? arena.take<float>(tokens * b_width) : nullptr;
  k_right = backward && paired ? arena.take<float>(tokens / 2 * k_width) : k;
  b_right = backward && paired ? arena.take<float>(tokens / 2 * b_width) : b;
  v = backward ? nullptr : arena.take<float>(tokens * v_width / (paired ? 2 : 1));
  v_t = backward ? arena.take<float>(tokens * v_depth) : nullptr;
  cos = arena.take<float>(tokens * pairs), sin = arena.take<float>(tokens * pairs);
  norm = arena.take<float>(n), phase = arena.take<double>(n * pairs);
}

void Keys::sum_phases(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t head) {
  parallel_for(0, tiles.size(), 16, [&](int64_t lo, int64_t hi) {
    alignas(64) float steps[kMaxWidth];
    for (int64_t t = lo; t < hi; ++t) {
      if (!tiles.attended(t)) continue;
      double* sums = phase + t * pairs;
      std::memset(sums, 0, pairs * sizeof(double));
      for (int64_t i = 0; i < tiles[t].count; ++i) {
        const float* theta = row_floats<V / 2>(p.theta, batch, tiles[t].begin + i, head, p.state_width / 2, steps);
        for (int64_t n = 0; n < pairs; n += V / 2) add_half(theta + n, sums + n);
      }
    }
  });
  double before[kMaxWidth / 2];
  for (int64_t t = 0; t < tiles.size(); ++t) {
    if (!tiles.attended(t)) continue;
    for (int64_t n = 0; n < pairs; ++n) {
      if (tiles[t].first == t) before[n] = 0;
      const double sum = phase[t * pairs + n];
      phase[t * pairs + n] = before[n], before[n] = wrap(before[n] + sum);
    }
  }
}

void Keys::pack(const AttentionParams& p, const Tiles& tiles, int64_t t, const Gates& gates, int64_t batch, int64_t head) {
  const Tile& tile = tiles[t];
  const int64_t token = t * kTile, count = tile.count;
  const int64_t widest = std::max({k_width, v_width, b_width});
  Scratch scratch(Use::tile, kTile * (2 * widest * sizeof(float) + pairs * sizeof(double)));
  float *const rows = static_cast<float*>(scratch.data()), *const words = rows + kTile * widest;
  double* const angles = reinterpret_cast<double*>(words + kTile * widest);
  alignas(64) float spare[kMaxWidth];
  const auto transpose = [&](const float* in, int64_t width, int64_t row, int64_t depth, float* out) {
    if (paired) pair_channels(in, width, {0, kTile}, words);
    transpose_tile(paired ? words : in, row, depth, out + token * depth);
  };

  float* k_rows = k ? k + token * k_width : rows;
  for (int64_t i = 0; i < count; ++i) {
    const float* in = row_floats(p.k, batch, tile.begin + i, head, p.head_width, spare);
    rope_row<false>(p, tile.begin + i, in, 1, k_rows + i * k_width);
  }
  zero_rows(k_rows, k_width, count);
  const float k_norm = p.bias == Bias::forget ? largest_norm(k_rows, k_width, nullptr, count) : 0;
  if (k && paired) round_rows(k_rows, k_width, {0, kTile}), pair_tokens(k_rows, k_width, {0, kTile}, k_right + token / 2 * k_width);
  transpose(k_rows, k_width, q_width, k_depth, k_t);

  float* v_rows = v && !paired ? v + token * v_width : rows;
  for (int64_t i = 0; i < count; ++i) read_row(p.v, batch, tile.begin + i, head, p.value_width, v_rows + i * v_width);
  zero_rows(v_rows, v_width, count);
  if (v && paired) pair_tokens(v_rows, v_width, {0, kTile}, v + token / 2 * v_width);
  if (v_t) transpose(v_rows, v_width, dy_width, v_depth, v_t);

  if (p.bias == Bias::forget) {
    const float v_norm = largest_norm(v_rows, v_width, nullptr, count);
    norm[t] = k_norm + 0 * (k_norm + v_norm);
  }
  if (p.bias != Bias::importance) return;
  float* b_rows = b ? b + token * b_width : rows;
  for (int64_t i = 0; i < count; ++i) {
    const double* before = i == 0 ? phase + t * pairs : angles + (i - 1) * pairs;
    const float* theta = row_floats<V / 2>(p.theta, batch, tile.begin + i, head, p.state_width / 2, spare);
    std::memcpy(angles + i * pairs, before, pairs * sizeof(double));
    for (int64_t n = 0; n < pairs; n += V / 2) add_half(theta + n, angles + i * pairs + n);
  }
  each_cos_sin(angles, count * pairs, cos + token * pairs, sin + token * pairs);
  for (int64_t i = 0; i < count; ++i) {
    const float* in = row_floats(p.b, batch, tile.begin + i, head, p.state_width, spare);
    rotate_row<false>(in, cos + (token + i) * pairs, sin + (token + i) * pairs, b_width, 1, b_rows + i * b_width);
  }
  zero_rows(b_rows, b_width, count);
  norm[t] = largest_norm(b_rows, b_width, gates.key + token, count);
  if (b && paired) round_rows(b_rows, b_width, {0, kTile}), pair_tokens(b_rows, b_width, {0, kTile}, b_right + token / 2 * b_width);
  transpose(b_rows, b_width, c_width, b_depth, b_t);
}

void pack_queries(const AttentionParams& p, const Tile& tile, int64_t index, const Keys& keys, int64_t batch, int64_t head,
                  float* q, float* c) {
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.head_width)));
  alignas(64) float spare[kMaxWidth];
  for (int64_t i = tile.rows.begin; i < tile.rows.end; ++i) {
    const int64_t token = tile.begin + i, query = token - p.offset, angle = (index * kTile + i) * keys.pairs;
    const float* in = row_floats(p.q, batch, query, head, p.head_width, spare);
    rope_row<false>(p, token, in, scale, q + i * keys.k_width);
    if (p.bias != Bias::importance) continue;
    in = row_floats(p.c, batch, query, head, p.state_width, spare);
    rotate_row<false>(in, keys.cos + angle, keys.sin + angle, keys.b_width, 1, c + i * keys.b_width);
  }
}

float largest_query_norm(const AttentionParams& p, const Tile& tile, int64_t index, const Keys& keys, const Gates& gates,
                         const float* q, const float* c) {
  const int64_t begin = tile.rows.begin, rows = tile.rows.end - begin;
  if (p.bias == Bias::none) return 1;
  if (p.bias == Bias::forget) return largest_norm(q + begin * keys.k_width, keys.k_width, nullptr, rows);
  return largest_norm(c + begin * keys.b_width, keys.b_width, gates.query + index * kTile + begin, rows);
}

void pack_keys(const AttentionParams& p, const Tiles& tiles, int64_t batch, int64_t key_head, Gates& gates, Keys& keys) {
  if (p.bias == Bias::importance) {
    gates.fill(p, tiles, batch, key_head);
    keys.sum_phases(p, tiles, batch, key_head);
  }
  for_each_free(tiles.size(), [&](int64_t t) {
    if (tiles.attended(t)) keys.pack(p, tiles, t, gates, batch, key_head);
  });
}

}  // namespace sisa::cpu::SISA_ISA
