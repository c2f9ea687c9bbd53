// One new token a row over its cache of keys (sisa_kernels/decode.py), in three passes.
//
// The token's key, value, state and g are written into its slot, and its queries rotated. Then the slots are cut into splits of
// kSplit, which run in parallel: scores, their softmax, the split's share of the result. Last the shares of a head are merged. The cut depends on the length alone: the result is the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../augment_math.h"
#include "../parallel.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace sisa::cpu::SISA_ISA {

namespace {

constexpr int64_t kSplit = 512;         // slots, a multiple of V
constexpr int64_t kTogether = 4;        // slots whose products run side by side
constexpr int64_t kSerialWork = 32768;  // multiply-adds that are not worth a second thread
constexpr float kForgotten = -104;      // exp of less is 0 in fp32
constexpr float kNever = -std::numeric_limits<float>::infinity();

int64_t padded(int64_t channels) {
  return (channels + V - 1) / V * V;
}

// ---- The new token -------------------------------------------------------------------------------------------------------------

void read(const Rows& x, int64_t row, int64_t head, int64_t channels, float* out) {
  with_type<BFloat16, Half>(x.dtype, [&]<class T>(std::type_identity<T>) {
    const T* in = static_cast<const T*>(x.data) + row * x.batch + head * x.head;
    for (int64_t i = 0; i < channels; ++i) out[i] = widened(in[i * x.channel]);
  });
}

void write(const float* in, const Rows& x, int64_t row, int64_t slot, int64_t head, int64_t channels) {
  with_type<BFloat16, Half>(x.dtype, [&]<class T>(std::type_identity<T>) {
    T* out = static_cast<T*>(x.data) + row * x.batch + slot * x.token + head * x.head;
    for (int64_t i = 0; i < channels; ++i) narrow(in[i], out[i * x.channel]);
  });
}

void rotate_pairs(float* x, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = rotate(even, odd, cos[i], -sin[i]), x[2 * i + 1] = rotate(odd, even, cos[i], sin[i]);
  }
}

// Scratch of all rows: the rotated queries with 1 / sqrt(head_width) and lam in them, padded with zeros.
struct Queries {
  explicit Queries(const DecodeParams& p)
      : width(padded(p.head_width)), state_width(padded(p.state_width)), q(p.batch * p.heads * width),
        c(p.batch * p.heads * state_width) {}
  int64_t width, state_width;
  Buffer<float> q, c;
};

void append(const DecodeParams& p, const Queries& queries, int64_t row, int64_t g, float* scratch) {
  const int64_t slot = p.lengths[row], pairs = p.head_width / 2, state_pairs = p.state_width / 2;
  float *x = scratch, *cos = x + std::max({p.head_width, p.value_width, p.state_width}), *sin = cos + pairs;
  float *state_cos = sin + pairs, *state_sin = state_cos + state_pairs;
  if (p.cos.data) read(p.cos, row, 0, pairs, cos), read(p.sin, row, 0, pairs, sin);
  const auto with_rope = [&](float* head) {
    if (p.cos.data) rotate_pairs(head, cos, sin, pairs);
  };

  double* decay = p.g_cache + row * p.g_batch + g * p.g_head + slot;
  read(p.log_decay, row, g, 1, x);
  decay[0] = decay[-1] + bounded_log_decay(x[0]);
  double* phase = p.phase + (row * p.key_heads + g) * state_pairs;
  read(p.theta, row, g, state_pairs, x);
  for (int64_t i = 0; i < state_pairs; ++i) {
    phase[i] = wrap(phase[i] + x[i]);
    sisa::cos_sin(phase[i], state_cos[i], state_sin[i]);
  }

  read(p.k, row, g, p.head_width, x);
  with_rope(x);
  write(x, p.k_cache, row, slot, g, p.head_width);
  read(p.v, row, g, p.value_width, x);
  write(x, p.v_cache, row, slot, g, p.value_width);
  read(p.b, row, g, p.state_width, x);
  rotate_pairs(x, state_cos, state_sin, state_pairs);
  write(x, p.b_cache, row, slot, g, p.state_width);

  const int64_t shared = p.heads / p.key_heads;
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.head_width)));
  for (int64_t h = g * shared; h < (g + 1) * shared; ++h) {
    float* q = queries.q + (row * p.heads + h) * queries.width;
    read(p.q, row, h, p.head_width, q);
    with_rope(q);
    for (int64_t i = 0; i < p.head_width; ++i) q[i] *= scale;
    float* c = queries.c + (row * p.heads + h) * queries.state_width;
    read(p.c, row, h, p.state_width, c);
    rotate_pairs(c, state_cos, state_sin, state_pairs);
    for (int64_t i = 0; i < p.state_width; ++i) c[i] *= p.lam[h];
  }
}

// ---- A split of the slots --------------------------------------------------------------------------------------------------------

// sums[n] += x . row n, lane by lane; x is padded.
template <int64_t N, class T>
void add_products(const float* x, const T* rows, int64_t stride, int64_t channels, Vec* sums) {
  for_channels(channels, [&](int64_t i, auto count) {
    const Vec own = load(x + i);
    for (int64_t n = 0; n < N; ++n) {
      sums[n] = fma(load(rows + n * stride + i, count), own, sums[n]);
    }
  });
}

// The scores of N slots; weight is exp(g_i - g_j), null where it is 0 for all of them.
template <int64_t N, class T>
void score(
    const float* q, const float* c, const T* k, int64_t k_stride, const T* b, int64_t b_stride, const float* weight,
    const DecodeParams& p, float* out) {
  Vec sums[N];
  for (int64_t n = 0; n < N; ++n) sums[n] = Vec{};
  if (weight) {
    add_products<N>(c, b, b_stride, p.state_width, sums);
    for (int64_t n = 0; n < N; ++n) sums[n] = sums[n] * weight[n];
  }
  add_products<N>(q, k, k_stride, p.head_width, sums);
  for (int64_t n = 0; n < N; ++n) out[n] = sum(sums[n]);
}

// out = sum_j weight[j] v_j for N vectors of channels, the last of them of count.
template <int64_t N, class T, class Count>
void weigh_values(const float* weight, const T* v, int64_t stride, int64_t slots, float* out, Count count) {
  Vec sums[N];
  for (int64_t n = 0; n < N; ++n) sums[n] = Vec{};
  for (int64_t j = 0; j < slots; ++j) {
    const Vec share = broadcast(weight[j]);
    for (int64_t n = 0; n < N; ++n) {
      sums[n] = fma(load(v + j * stride + n * V, count), share, sums[n]);
    }
  }
  for (int64_t n = 0; n < N; ++n) store(sums[n], out + n * V);
}

// What a split gives to a head: the largest score, the sum of exp(score - largest), and that of v with these weights, padded.
struct Share {
  float* data;
  float& largest() const { return data[0]; }
  float& total() const { return data[1]; }
  float* values() const { return data + V; }
};

template <class T>
void attend(const DecodeParams& p, const Queries& queries, int64_t row, int64_t g, int64_t begin, int64_t count, float* shares,
    int64_t share_stride) {
  const auto slots = [&](const Rows& cache) {
    return static_cast<const T*>(cache.data) + row * cache.batch + g * cache.head + begin * cache.token;
  };
  const T *k = slots(p.k_cache), *b = slots(p.b_cache), *v = slots(p.v_cache);
  const int64_t k_stride = p.k_cache.token, b_stride = p.b_cache.token, v_stride = p.v_cache.token;
  const int64_t shared = p.heads / p.key_heads, vectors = padded(count);
  alignas(64) float weight[kSplit] = {}, scores[kSplit];
  const double *decay = p.g_cache + row * p.g_batch + g * p.g_head, now = decay[p.lengths[row]];
  for (int64_t j = 0; j < count; ++j) weight[j] = static_cast<float>(now - decay[begin + j]);
  // g falls along the slots: the last one is the least forgotten.
  const bool felt = !(weight[count - 1] < kForgotten);
  for (int64_t j = 0; j < vectors; j += V) store(exp(load(weight + j)), weight + j);

  for (int64_t r = 0; r < shared; ++r) {
    const int64_t head = row * p.heads + g * shared + r;
    const float *q = queries.q + head * queries.width, *c = queries.c + head * queries.state_width;
    int64_t j = 0;
    for (; j + kTogether <= count; j += kTogether) {
      const float* w = felt ? weight + j : nullptr;
      score<kTogether>(q, c, k + j * k_stride, k_stride, b + j * b_stride, b_stride, w, p, scores + j);
    }
    for (; j < count; ++j) {
      score<1>(q, c, k + j * k_stride, k_stride, b + j * b_stride, b_stride, felt ? weight + j : nullptr, p, scores + j);
    }
    std::fill(scores + count, scores + vectors, kNever);

    const Share share{shares + r * share_stride};
    Vec most = broadcast(kNever), total{};
    for (j = 0; j < vectors; j += V) most = maximum(most, load(scores + j));
    share.largest() = largest(most);
    for (j = 0; j < vectors; j += V) {
      const Vec x = exp(load(scores + j) - share.largest());
      store(x, scores + j);
      total = total + x;
    }
    share.total() = sum(total);
    int64_t i = 0;
    for (; i + 4 * V <= p.value_width; i += 4 * V) weigh_values<4>(scores, v + i, v_stride, count, share.values() + i, Whole());
    for_channels(p.value_width - i, [&](int64_t n, auto channels) {
      weigh_values<1>(scores, v + i + n, v_stride, count, share.values() + i + n, channels);
    });
  }
}

}  // namespace

void decode(const DecodeParams& p) {
  const int64_t G = p.key_heads, shared = p.heads / G, width = p.head_width + p.state_width + p.value_width;
  const Queries queries(p);
  parallel_for(0, p.batch * G, 1 + kSerialWork / (16 * shared * width), [&](int64_t lo, int64_t hi) {
    const Buffer<float> scratch(std::max({p.head_width, p.value_width, p.state_width}) + p.head_width + p.state_width);
    for (int64_t i = lo; i < hi; ++i) append(p, queries, i / G, i % G, scratch);
  });

  // A row's splits come one after another, each with all key heads.
  std::vector<std::pair<int64_t, int64_t>> splits;
  std::vector<int64_t> first;
  int64_t longest = 0;
  for (int64_t row = 0; row < p.batch; ++row) {
    first.push_back(static_cast<int64_t>(splits.size()));
    for (int64_t begin = 0; begin <= p.lengths[row]; begin += kSplit) splits.emplace_back(row, begin);
    longest = std::max(longest, p.lengths[row] + 1);
  }
  first.push_back(static_cast<int64_t>(splits.size()));
  const int64_t stride = V + padded(p.value_width), count = static_cast<int64_t>(splits.size());
  const Buffer<float> shares(count * p.heads * stride);
  const int64_t grain = 1 + kSerialWork / (std::min(longest, kSplit) * shared * width);
  parallel_for(0, count * G, grain, [&](int64_t lo, int64_t hi) {
    with_type<BFloat16, Half>(p.k_cache.dtype, [&]<class T>(std::type_identity<T>) {
      for (int64_t i = lo; i < hi; ++i) {
        const auto [row, begin] = splits[i / G];
        const int64_t slots = std::min(kSplit, p.lengths[row] + 1 - begin);
        attend<T>(p, queries, row, i % G, begin, slots, shares + i * shared * stride, stride);
      }
    });
  });

  parallel_for(0, p.batch * p.heads, 1 + kSerialWork / (p.value_width * (1 + longest / kSplit)), [&](int64_t lo, int64_t hi) {
    const Buffer<float> merged(padded(p.value_width));
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t row = i / p.heads, head = i % p.heads;
      const auto share = [&](int64_t split) { return Share{shares + (split * p.heads + head) * stride}; };
      float largest = kNever, total = 0;
      for (int64_t n = first[row]; n < first[row + 1]; ++n) largest = std::max(largest, share(n).largest());
      std::fill_n(static_cast<float*>(merged), p.value_width, 0.f);
      for (int64_t n = first[row]; n < first[row + 1]; ++n) {
        const float factor = std::exp(share(n).largest() - largest);
        total += factor * share(n).total();
        for (int64_t j = 0; j < p.value_width; ++j) merged[j] += factor * share(n).values()[j];
      }
      for (int64_t j = 0; j < p.value_width; ++j) merged[j] /= total;
      write(merged, p.y, row, 0, head, p.value_width);
    }
  });
}

}  // namespace sisa::cpu::SISA_ISA
