// One new token a row over its cache of keys (sisa_kernels/step.py), in three passes.
//
// The token's key, value, state and g are written into its slot, and its queries rotated. Then the slots are cut into splits of
// kSplit, which run in parallel: scores, their softmax, the split's share of the result. Last the shares of a head are merged. The
// cut depends on the length alone: the result is the same bits for any number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "../augment_math.h"
#include "../decode.h"
#include "../parallel.h"
#include "kernels.h"
#include "scratch.h"
#include "vector.h"

namespace sisa::cpu::SISA_ISA {

namespace {

constexpr int64_t kSplit = 512;         // slots, a multiple of V
constexpr int64_t kTogether = 4;        // slots whose products run side by side
constexpr int64_t kSerialWork = 32768;  // multiply-adds that are not worth a second thread
constexpr int64_t kAhead = 16;          // slots before their use that keys and states are fetched
constexpr float kHorizon = 0x1p-24f;    // importance below it is hidden by the rounding of a score
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

// Scratch of all rows: the rotated queries with 1 / sqrt(head_width) and lam in them, padded with zeros; the norms of those of
// importance.
struct Queries {
  explicit Queries(const DecodeParams& p)
      : width(padded(p.head_width)), state_width(padded(p.state_width)), q(p.batch * p.heads * width),
        c(p.batch * p.heads * state_width), norm(p.batch * p.heads) {}
  int64_t width, state_width;
  Buffer<float> q, c, norm;
};

float norm(const float* x, int64_t channels) {
  double squares = 0;
  for (int64_t i = 0; i < channels; ++i) squares += static_cast<double>(x[i]) * x[i];
  return static_cast<float>(std::sqrt(squares));
}

// log(1 + e^x), as torch's softplus has it: x itself above 20.
float softplus(float x) {
  return x > 20 ? x : static_cast<float>(std::log1p(std::exp(static_cast<double>(x))));
}

void append_decay(const DecodeParams& p, int64_t row, int64_t head, float log_decay) {
  double* g = p.g_cache + row * p.g_batch + head * p.g_head + p.lengths[row];
  g[0] = g[-1] + bounded_log_decay(log_decay);
}

void append(const DecodeParams& p, const Queries& queries, int64_t row, int64_t g, float* scratch) {
  const int64_t slot = p.lengths[row], pairs = p.head_width / 2, state_pairs = p.state_width / 2;
  const int64_t shared = p.heads / p.key_heads, first = g * shared;
  float *x = scratch, *cos = x + std::max({p.head_width, p.value_width, p.state_width}), *sin = cos + pairs;
  if (p.cos.data) read(p.cos, row, 0, pairs, cos), read(p.sin, row, 0, pairs, sin);
  const auto with_rope = [&](float* head) {
    if (p.cos.data) rotate_pairs(head, cos, sin, pairs);
  };
  read(p.k, row, g, p.head_width, x);
  with_rope(x);
  write(x, p.k_cache, row, slot, g, p.head_width);
  read(p.v, row, g, p.value_width, x);
  write(x, p.v_cache, row, slot, g, p.value_width);
  const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(p.head_width)));
  for (int64_t h = first; h < first + shared; ++h) {
    float* q = queries.q + (row * p.heads + h) * queries.width;
    read(p.q, row, h, p.head_width, q);
    with_rope(q);
    for (int64_t i = 0; i < p.head_width; ++i) q[i] *= scale;
    if (p.bias != Bias::forget) continue;
    read(p.log_decay, row, h, 1, x);
    append_decay(p, row, h, x[0]);
  }
  if (p.bias != Bias::importance) return;

  read(p.log_decay, row, g, 1, x);
  append_decay(p, row, g, p.decay_bias ? -softplus(x[0] + p.decay_bias[g]) : x[0]);
  float *state_cos = sin + pairs, *state_sin = state_cos + state_pairs;
  double* phase = p.phase + (row * p.key_heads + g) * state_pairs;
  read(p.theta, row, g, state_pairs, x);
  for (int64_t i = 0; i < state_pairs; ++i) {
    phase[i] = wrap(phase[i] + x[i]);
    sisa::cos_sin(phase[i], state_cos[i], state_sin[i]);
  }
  read(p.b, row, g, p.state_width, x);
  rotate_pairs(x, state_cos, state_sin, state_pairs);
  write(x, p.b_cache, row, slot, g, p.state_width);
  double& reach = p.reach[row * p.key_heads + g];
  const double longest = norm(x, p.state_width);
  if (longest > reach || longest != longest) reach = longest;  // a NaN stays
  for (int64_t h = first; h < first + shared; ++h) {
    float* c = queries.c + (row * p.heads + h) * queries.state_width;
    read(p.c, row, h, p.state_width, c);
    rotate_pairs(c, state_cos, state_sin, state_pairs);
    const float lam = p.decay_bias ? softplus(p.lam[h]) : p.lam[h];
    for (int64_t i = 0; i < p.state_width; ++i) c[i] *= lam;
    queries.norm[row * p.heads + h] = norm(c, p.state_width);
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

// A cache's slots of one head, from that of a split's first on.
template <class T>
struct Slots {
  const T* data;
  int64_t stride, channels;

  const T* operator[](int64_t slot) const { return data + slot * stride; }

  // The address may lie past the cache.
  void prefetch(int64_t slot) const {
    const uintptr_t row = reinterpret_cast<uintptr_t>(data) + slot * stride * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < channels * static_cast<int64_t>(sizeof(T)); i += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(row + i));
    }
  }
};

// What scores of a head's slots are made of; b.data is null where importance is not felt.
template <class T>
struct Head {
  const float *q, *c;
  Slots<T> k, b, v;
  const float* decay;  // exp(g_i - g_j) (importance) or g_i - g_j (forget)
};

// The scores of N slots. The values, which come next, are fetched along with the keys: one stream alone does not fill the bus.
template <int64_t N, Bias kBias, class T>
void score(const Head<T>& head, int64_t slot, float* out) {
  Vec sums[N];
  for (int64_t n = 0; n < N; ++n) {
    sums[n] = Vec{};
    head.k.prefetch(slot + n + kAhead);
    head.v.prefetch(slot + n);
  }
  if (kBias == Bias::importance && head.b.data) {
    for (int64_t n = 0; n < N; ++n) head.b.prefetch(slot + n + kAhead);
    add_products<N>(head.c, head.b[slot], head.b.stride, head.b.channels, sums);
    for (int64_t n = 0; n < N; ++n) sums[n] = sums[n] * head.decay[slot + n];
  }
  add_products<N>(head.q, head.k[slot], head.k.stride, head.k.channels, sums);
  for (int64_t n = 0; n < N; ++n) out[n] = sum(sums[n]) + (kBias == Bias::forget ? head.decay[slot + n] : 0);
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
Slots<T> slots_of(const Rows& cache, int64_t row, int64_t head, int64_t begin, int64_t channels) {
  return {static_cast<const T*>(cache.data) + row * cache.batch + head * cache.head + begin * cache.token, cache.token, channels};
}

// The scores of a split's slots, -inf up to whole vectors, to their softmax; returns the share without that of the values.
template <class T>
void weigh(const Head<T>& head, float* scores, int64_t count, const Share& share) {
  const int64_t vectors = padded(count);
  std::fill(scores + count, scores + vectors, kNever);
  Vec most = broadcast(kNever), total{};
  for (int64_t j = 0; j < vectors; j += V) most = maximum(most, load(scores + j));
  share.largest() = largest(most);
  for (int64_t j = 0; j < vectors; j += V) {
    const Vec x = exp(load(scores + j) - share.largest());
    store(x, scores + j);
    total = total + x;
  }
  share.total() = sum(total);
  const Slots<T>& v = head.v;
  int64_t i = 0;
  for (; i + 4 * V <= v.channels; i += 4 * V) weigh_values<4>(scores, v.data + i, v.stride, count, share.values() + i, Whole());
  for_channels(v.channels - i, [&](int64_t n, auto channels) {
    weigh_values<1>(scores, v.data + i + n, v.stride, count, share.values() + i + n, channels);
  });
}

template <Bias kBias, class T>
void attend(const DecodeParams& p, const Queries& queries, int64_t row, int64_t g, int64_t begin, int64_t count, float* shares,
    int64_t share_stride) {
  const int64_t shared = p.heads / p.key_heads;
  alignas(64) float decay[kSplit] = {}, scores[kSplit];
  Head<T> head{};
  head.k = slots_of<T>(p.k_cache, row, g, begin, p.head_width), head.v = slots_of<T>(p.v_cache, row, g, begin, p.value_width);
  head.decay = decay;
  const auto fall = [&](int64_t of, int64_t slot) {
    const double* sums = p.g_cache + row * p.g_batch + of * p.g_head;
    return static_cast<float>(sums[p.lengths[row]] - sums[begin + slot]);
  };
  bool weighed = false;
  for (int64_t r = 0; r < shared; ++r) {
    const int64_t h = g * shared + r, query = row * p.heads + h;
    head.q = queries.q + query * queries.width, head.c = queries.c + query * queries.state_width;
    if constexpr (kBias == Bias::importance) {
      // g falls along the slots: the last one is the least forgotten. 1.01: a state is rounded in the cache.
      const float reach = 1.01f * static_cast<float>(p.reach[row * p.key_heads + g]);
      head.b = {};
      if (!(std::exp(fall(g, count - 1)) * queries.norm[query] * reach < kHorizon)) {
        head.b = slots_of<T>(p.b_cache, row, g, begin, p.state_width);
        for (int64_t j = 0; j < count && !weighed; ++j) decay[j] = fall(g, j);
        for (int64_t j = 0; j < count && !weighed; j += V) store(exp(load(decay + j)), decay + j);
        weighed = true;
      }
    }
    if constexpr (kBias == Bias::forget) {
      for (int64_t j = 0; j < count; ++j) decay[j] = fall(h, j);
    }
    int64_t j = 0;
    for (; j + kTogether <= count; j += kTogether) score<kTogether, kBias>(head, j, scores + j);
    for (; j < count; ++j) score<1, kBias>(head, j, scores + j);
    weigh(head, scores, count, Share{shares + r * share_stride});
  }
}

// Calls f with the bias as a constant.
template <class F>
void with_bias(Bias bias, F f) {
  switch (bias) {
    case Bias::none: return f(std::integral_constant<Bias, Bias::none>());
    case Bias::importance: return f(std::integral_constant<Bias, Bias::importance>());
    case Bias::forget: return f(std::integral_constant<Bias, Bias::forget>());
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
      with_bias(p.bias, [&]<Bias kBias>(std::integral_constant<Bias, kBias>) {
        for (int64_t i = lo; i < hi; ++i) {
          const auto [row, begin] = splits[i / G];
          const int64_t slots = std::min(kSplit, p.lengths[row] + 1 - begin);
          attend<kBias, T>(p, queries, row, i % G, begin, slots, shares + i * shared * stride, stride);
        }
      });
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
