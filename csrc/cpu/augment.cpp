// The augmentation on the CPU: one pass over the inputs, forward and backward.
//
// The sequence is cut into pieces of at most kPiece tokens, none across a segment's boundary. The running sums are chained over
// the pieces in two passes (each piece's own sums, then their prefix), so that pieces run in parallel whatever the batch. How it
// is cut depends on the length and the segments alone: the result is the same bits for any number of threads.
//
// Within a piece each token is taken with all its heads, whose rows usually lie side by side. Arithmetic is fp32 in registers
// between the inputs and the results, but for the sums of decay and phase and of their gradients, which are fp64.

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "../augment_math.h"
#include "../sisa.h"
#include "vector.h"

namespace sisa::cpu {

namespace {

constexpr int64_t kPiece = 32;               // tokens
constexpr int64_t kStreamedBytes = 4 << 20;  // of a result, about a core's second-level cache and more

// Zeroed scratch, aligned to cache lines and padded so that vector loops may run over its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (size * sizeof(T) + 2 * sizeof(Vec) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

// ---- A token's rows, one a head ------------------------------------------------------------------------------------------------

// A row a head; the channels lie side by side.
template <class T>
struct Heads {
  T* data;
  int64_t stride;
  int64_t ahead = 0;      // of an input: where the token taken next has the same channels
  bool streamed = false;  // a result to be written past the caches

  T* operator[](int64_t head) const { return data + head * stride; }
};

template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(std::type_identity<float>());
    case DType::bfloat16: return f(std::type_identity<at::BFloat16>());
    case DType::float16: return f(std::type_identity<at::Half>());
  }
}

// The channels from ``first`` on of a token's heads, in place where the last stride is 1, else gathered into scratch; the token
// taken next is ``step`` further on.
template <class T>
Heads<const T> input(
    const Rows& x, int64_t batch, int64_t token, int64_t first, int64_t heads, int64_t channels, int64_t step, T* scratch) {
  const T* in = static_cast<const T*>(x.data) + batch * x.batch + token * x.token + first * x.channel;
  if (x.channel == 1) return {in, x.head, step * x.token};
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t n = 0; n < channels; ++n) scratch[h * channels + n] = in[h * x.head + n * x.channel];
  }
  return {scratch, channels};
}

// A result's rows; results are contiguous. Those too large to stay in the caches are written past them, where the rows are whole
// cache lines: fetching the lines to be overwritten would take as long as writing them.
template <class T>
Heads<T> result(const AugmentParams& p, const Rows& x, int64_t batch, int64_t token, int64_t first, int64_t heads, int64_t channels) {
  T* out = static_cast<T*>(x.data) + batch * x.batch + token * x.token + first;
  const int64_t size = sizeof(T);
  const bool whole_lines = (reinterpret_cast<uintptr_t>(out) | (x.head * size) | (channels * size)) % 64 == 0;
  return {out, x.head, 0, whole_lines && p.batch * p.length * heads * channels * size >= kStreamedBytes};
}

// An fp32 tensor's row with its heads packed.
const float* packed(const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t channels, float* scratch) {
  const Heads<const float> in = input(x, batch, token, 0, heads, channels, 0, scratch);
  if (in.stride == channels || heads == 1) return in.data;
  for (int64_t h = 0; h < heads; ++h) std::copy_n(in[h], channels, scratch + h * channels);
  return scratch;
}

// V channels of an input, or the count that are left; asks for the next token's. Too many streams run side by side here for the
// hardware to follow.
template <class T, class Count>
Vec fetch(Heads<const T> in, const T* at, Count count) {
  __builtin_prefetch(at + in.ahead);
  return load(at, count);
}

template <class T, class O>
void copy(Heads<const T> in, Heads<O> out, int64_t heads, int64_t channels) {
  for (int64_t h = 0; h < heads; ++h) {
    for_channels(channels, [&](int64_t i, auto count) { store(fetch(in, in[h] + i, count), out[h] + i, count, out.streamed); });
  }
}

template <class O>
void fill_zeros(Heads<O> out, int64_t heads, int64_t channels) {
  for (int64_t h = 0; h < heads; ++h) std::memset(static_cast<void*>(out[h]), 0, channels * sizeof(O));
}

// Cosines and signed sines of each channel (augment_math.h), padded: rows of ``stride``, each for ``repeat`` heads.
struct Angles {
  const float *cos, *sin;
  int64_t repeat, stride;
};

// Calls f(head, its cosines, its signed sines, index of these).
template <class F>
void for_heads(Angles angles, int64_t heads, F f) {
  for (int64_t h = 0, group = 0; h < heads; ++group) {
    const float *cos = angles.cos + group * angles.stride, *sin = angles.sin + group * angles.stride;
    for (const int64_t end = h + angles.repeat; h < end; ++h) f(h, cos, sin, group);
  }
}

template <bool inverse, class T, class O>
void rotate_rows(Heads<const T> in, Heads<O> out, Angles angles, int64_t heads, int64_t channels) {
  for_heads(angles, heads, [&](int64_t h, const float* cos, const float* sin, int64_t) {
    for_channels(channels, [&](int64_t i, auto count) {
      const Vec x = fetch(in, in[h] + i, count), c = load(cos + i), s = load(sin + i);
      store(inverse ? unrotate(x, partners(x), c, s) : rotate(x, partners(x), c, s), out[h] + i, count, out.streamed);
    });
  });
}

template <class T, class O>
void augment_rows(Heads<const T> in, Heads<O> out, Angles angles, const float* factors, int64_t heads, int64_t channels) {
  for_heads(angles, heads, [&](int64_t h, const float* cos, const float* sin, int64_t) {
    const Vec factor(factors[h]);
    for_channels(channels, [&](int64_t i, auto count) {
      const Vec x = fetch(in, in[h] + i, count);
      store(factor * rotate(x, partners(x), load(cos + i), load(sin + i)), out[h] + i, count, out.streamed);
    });
  });
}

// The gradient of augment_rows from x and that of its result; adds each pair's dL/dphase to dphase [heads / repeat, pairs] and
// returns each head's dL/dexponent.
template <class T, class O>
void augment_rows_backward(
    Heads<const T> x, Heads<const O> dy, Heads<T> dx, Angles angles, const float* factors, int64_t heads, int64_t channels,
    double* dphase, double* dexponent) {
  for_heads(angles, heads, [&](int64_t h, const float* cos, const float* sin, int64_t group) {
    double* phases = dphase + group * (channels / 2);
    const Vec factor(factors[h]);
    Dot dot;
    for_channels(channels, [&](int64_t i, auto count) {
      const Vec value = fetch(x, x[h] + i, count), c = load(cos + i), s = load(sin + i);
      const Vec u = rotate(value, partners(value), c, s), du = factor * fetch(dy, dy[h] + i, count);
      store(unrotate(du, partners(du), c, s), dx[h] + i, count, dx.streamed);
      dot.add(u, du);
      add_even(d_phase(u, partners(u), du, partners(du)), phases + i / 2);
    });
    dexponent[h] = dot.total();
  });
}

// ---- The running sums of decay and phase -------------------------------------------------------------------------------------

struct Piece {
  int64_t begin, end, segment;
};

std::vector<Piece> cut(const AugmentParams& p) {
  std::vector<Piece> pieces;
  for (int64_t n = 0; n < p.segments; ++n) {
    const int64_t end = n + 1 < p.segments ? p.starts[n + 1] : p.length;
    for (int64_t begin = p.starts[n]; begin < end; begin += kPiece) pieces.push_back({begin, std::min(begin + kPiece, end), n});
  }
  return pieces;
}

// Calls work(batch, piece's index) for all of them; scratch() makes a thread's buffers.
template <class Scratch, class Work>
void for_each_piece(const AugmentParams& p, int64_t pieces, Scratch scratch, Work work) {
  at::parallel_for(0, p.batch * pieces, 1, [&](int64_t lo, int64_t hi) {
    auto buffers = scratch();
    for (int64_t i = lo; i < hi; ++i) work(buffers, i / pieces, i % pieces);
    fence();
  });
}

// What the pieces start from: the exponent x = g - m of token t is local(t) + base(piece), m the middle of g's range in the
// segment, and the phase before a piece's first token is phase(piece), wrapped.
class Scans {
 public:
  Scans(const AugmentParams& p, const std::vector<Piece>& pieces)
      : p_(p), pairs_(p.key_heads * p.state_width / 2), pieces_(pieces.size()),
        local_(p.batch * p.length * p.key_heads), base_(p.batch * pieces_ * p.key_heads),
        phase_(p.batch * (pieces_ + 1) * pairs_) {
    for_each_piece(p, pieces_, [&] { return Buffer<float>(std::max(pairs_, p.key_heads)); },
        [&](float* scratch, int64_t batch, int64_t n) { sum_piece(batch, pieces[n], n, scratch); });
    at::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; ++i) chain(pieces, i / p.key_heads, i % p.key_heads);
    });
  }

  double* local(int64_t batch, int64_t token) const { return local_ + (batch * p_.length + token) * p_.key_heads; }
  double* base(int64_t batch, int64_t piece) const { return base_ + (batch * pieces_ + piece) * p_.key_heads; }
  double* phase(int64_t batch, int64_t piece) const { return phase_ + (batch * (pieces_ + 1) + piece) * pairs_; }

 private:
  // local() of the piece's tokens, and its sum of theta in the place of the next piece's phase.
  void sum_piece(int64_t batch, const Piece& piece, int64_t index, float* scratch) {
    double* total = phase(batch, index + 1);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const float* log_decay = packed(p_.log_decay, batch, t, p_.key_heads, 1, scratch);
      double* here = local(batch, t);
      for (int64_t g = 0; g < p_.key_heads; ++g) {
        here[g] = bounded_log_decay(log_decay[g]);
        if (t > piece.begin) here[g] += here[g - p_.key_heads];
      }
      const float* theta = packed(p_.theta, batch, t, p_.key_heads, p_.state_width / 2, scratch);
      for (int64_t i = 0; i < pairs_; ++i) total[i] += theta[i];
    }
  }

  void chain(const std::vector<Piece>& pieces, int64_t batch, int64_t g) {
    const int64_t width = p_.state_width / 2;
    for (int64_t n = 0; n < pieces_; ++n) {
      const double* from = phase(batch, n) + g * width;
      double* to = phase(batch, n + 1) + g * width;
      for (int64_t i = 0; i < width; ++i) to[i] = wrap(from[i] + to[i]);
    }
    for (int64_t first = 0, n = 0; n < pieces_; first = n) {
      double g_before = 0;
      for (; n < pieces_ && pieces[n].segment == pieces[first].segment; ++n) {
        base(batch, n)[g] = g_before;
        g_before += local(batch, pieces[n].end - 1)[g];
      }
      const double middle = (local(batch, pieces[first].begin)[g] + g_before) / 2;
      for (int64_t i = first; i < n; ++i) base(batch, i)[g] -= middle;
    }
  }

  const AugmentParams& p_;
  int64_t pairs_, pieces_;
  Buffer<double> local_, base_, phase_;
};

// ---- A thread's work -----------------------------------------------------------------------------------------------------------

// The factors, cosines and sines of one token, all heads.
struct Token {
  const AugmentParams& p;
  const Scans& scans;
  const int64_t pairs = p.state_width / 2, half = p.cos.data ? p.head_width / 2 : 0;  // half: rotary pairs
  const int64_t repeat = p.heads / p.key_heads;
  int64_t batch = 0, piece = 0;
  Buffer<float> factor_q{p.heads}, factor_k{p.key_heads}, cos{p.key_heads * p.state_width}, sin{p.key_heads * p.state_width};
  Buffer<float> cos_rotary{2 * half}, sin_rotary{2 * half}, scratch{p.heads * std::max(p.head_width, p.state_width)};
  Buffer<double> phase{p.key_heads * pairs}, exponent{p.key_heads}, growth{p.key_heads};  // exponent: g - m, not clamped
  Buffer<double> scale_q{p.heads}, scale_k{p.key_heads};

  Token(const AugmentParams& params, const Scans& sums) : p(params), scans(sums) {
    const bool shared = p.heads != p.key_heads;
    for (int64_t h = 0; h < p.heads; ++h) scale_q[h] = query_scale(p.head_width, p.lam[h], shared);
    for (int64_t g = 0; g < p.key_heads; ++g) scale_k[g] = key_scale(p.head_width, p.lam[g], shared);
  }

  // Before a walk over the piece: forward from its first token, or back from its last.
  void enter(int64_t batch_index, int64_t piece_index, bool forward) {
    batch = batch_index;
    piece = piece_index;
    std::copy_n(scans.phase(batch, forward ? piece : piece + 1), p.key_heads * pairs, static_cast<double*>(phase));
  }

  void forward_to(int64_t token) {
    add_theta(token, 1);
    set(token);
  }

  void back_to(int64_t token) {
    set(token);
    add_theta(token, -1);
  }

  void add_theta(int64_t token, double sign) {
    const float* theta = packed(p.theta, batch, token, p.key_heads, pairs, scratch);
    double* sum = phase;
    for (int64_t i = 0; i < p.key_heads * pairs; ++i) sum[i] += sign * theta[i];
  }

  void set(int64_t token) {
    cos_sin(phase, p.key_heads * pairs, cos, sin);
    const double *local = scans.local(batch, token), *base = scans.base(batch, piece);
    for (int64_t g = 0; g < p.key_heads; ++g) growth[g] = clamped(exponent[g] = local[g] + base[g], p.clamp);
    using Double = at::vec::Vectorized<double>;
    for (int64_t g = 0; g < p.key_heads; g += Double::size()) Double::loadu(growth + g).exp().store(growth + g);
    for (int64_t g = 0; g < p.key_heads; ++g) {
      factor_k[g] = static_cast<float>(scale_k[g] / growth[g]);
      for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) factor_q[h] = static_cast<float>(scale_q[h] * growth[g]);
    }
    if (half == 0) return;
    const float* c = packed(p.cos, 0, token, 1, half, scratch);
    const float* s = packed(p.sin, 0, token, 1, half, scratch + half);
    for (int64_t i = 0; i < half; ++i) expand(c[i], s[i], cos_rotary + 2 * i, sin_rotary + 2 * i);
  }

  Angles rotary(int64_t heads) const { return {cos_rotary, sin_rotary, heads, 0}; }
};

// A token's queries or keys: what differs between the two.
struct Side {
  int64_t heads;
  const Rows &head, &state, &augmented;  // q, c, q_aug or k, b, k_aug
  Angles angles;
  const float* factors;
};

Side query_side(const Token& x) {
  return {x.p.heads, x.p.q, x.p.c, x.p.q_aug, {x.cos, x.sin, x.repeat, x.p.state_width}, x.factor_q};
}

Side key_side(const Token& x) {
  return {x.p.key_heads, x.p.k, x.p.b, x.p.k_aug, {x.cos, x.sin, 1, x.p.state_width}, x.factor_k};
}

template <class T, class O>
void write(Token& x, int64_t token, const Side& side) {
  const AugmentParams& p = x.p;
  const int64_t heads = side.heads, head_width = p.head_width, state_width = p.state_width;
  T* scratch = reinterpret_cast<T*>(static_cast<float*>(x.scratch));
  const Heads<const T> head = input(side.head, x.batch, token, 0, heads, head_width, 1, scratch);
  const Heads<O> augmented = result<O>(p, side.augmented, x.batch, token, 0, heads, head_width);
  if (x.half) {
    rotate_rows<false>(head, augmented, x.rotary(heads), heads, head_width);
  } else {
    copy(head, augmented, heads, head_width);
  }
  const Heads<const T> state = input(side.state, x.batch, token, 0, heads, state_width, 1, scratch);
  const Heads<O> augmented_state = result<O>(p, side.augmented, x.batch, token, head_width, heads, state_width);
  augment_rows(state, augmented_state, side.angles, side.factors, heads, state_width);
  const int64_t used = head_width + state_width, rest = p.width - used;
  if (rest > 0) fill_zeros(result<O>(p, side.augmented, x.batch, token, used, heads, rest), heads, rest);
}

// A backward token's sums from the piece's end back, and a second scratch row.
struct BackwardToken : Token {
  Buffer<float> scratch_gradient{p.heads * std::max(p.head_width, p.state_width)};
  Buffer<double> phase_sums{p.key_heads * pairs}, row{p.heads}, col{p.key_heads};
  using Token::Token;
};

// Writes the gradients of one side's head and state rows, adds to dphase and returns dexponent as augment_rows_backward.
template <class T, class O>
void write_backward(
    BackwardToken& x, int64_t token, const Side& side, const Rows& dhead, const Rows& dstate, double* dphase, double* dexponent) {
  const AugmentParams& p = x.p;
  const int64_t heads = side.heads, head_width = p.head_width, state_width = p.state_width;
  T* scratch = reinterpret_cast<T*>(static_cast<float*>(x.scratch));
  O* scratch_gradient = reinterpret_cast<O*>(static_cast<float*>(x.scratch_gradient));
  const Heads<const O> augmented = input(side.augmented, x.batch, token, 0, heads, head_width, -1, scratch_gradient);
  const Heads<T> head = result<T>(p, dhead, x.batch, token, 0, heads, head_width);
  if (x.half) {
    rotate_rows<true>(augmented, head, x.rotary(heads), heads, head_width);
  } else {
    copy(augmented, head, heads, head_width);
  }
  const Heads<const O> gradient = input(side.augmented, x.batch, token, head_width, heads, state_width, -1, scratch_gradient);
  const Heads<const T> state = input(side.state, x.batch, token, 0, heads, state_width, -1, scratch);
  const Heads<T> dstate_row = result<T>(p, dstate, x.batch, token, 0, heads, state_width);
  augment_rows_backward(state, gradient, dstate_row, side.angles, side.factors, heads, state_width, dphase, dexponent);
}

// Calls f with the types of the inputs and of the augmented tensors.
template <class F>
void with_types(const AugmentParams& p, F f) {
  with_type(p.q.dtype, [&]<class T>(std::type_identity<T> inputs) {
    with_type(p.q_aug.dtype, [&]<class O>(std::type_identity<O> augmented) { f(inputs, augmented); });
  });
}

}  // namespace

void augment(const AugmentParams& p) {
  const std::vector<Piece> pieces = cut(p);
  const Scans scans(p, pieces);
  for_each_piece(p, pieces.size(), [&] { return Token(p, scans); }, [&](Token& x, int64_t batch, int64_t n) {
    x.enter(batch, n, true);
    with_types(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
      for (int64_t t = pieces[n].begin; t < pieces[n].end; ++t) {
        x.forward_to(t);
        write<T, O>(x, t, query_side(x));
        write<T, O>(x, t, key_side(x));
      }
    });
  });
}

// The reverse running sums go the same way as the forward ones: within each piece, then over the pieces of a segment, whose
// sums are added in a last pass over dlog_decay and dtheta.
void augment_backward(const AugmentBackwardParams& p) {
  const std::vector<Piece> pieces = cut(p);
  const Scans scans(p, pieces);
  const int64_t count = pieces.size(), G = p.key_heads, width = p.state_width / 2, pairs = G * width, repeat = p.heads / G;
  const Buffer<double> decay_sums(p.batch * count * G), phase_sums(p.batch * count * pairs), lam_sums(p.batch * count * p.heads);
  const Buffer<double> dg(p.batch * p.length * G);

  for_each_piece(p, count, [&] { return BackwardToken(p, scans); }, [&](BackwardToken& x, int64_t batch, int64_t n) {
    double *decay = decay_sums + (batch * count + n) * G, *phase = phase_sums + (batch * count + n) * pairs;
    double* lam = lam_sums + (batch * count + n) * p.heads;
    x.enter(batch, n, false);
    std::fill_n(static_cast<double*>(x.phase_sums), pairs, 0.0);
    with_types(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
      for (int64_t t = pieces[n].end - 1; t >= pieces[n].begin; --t) {
        x.back_to(t);
        write_backward<T, O>(x, t, query_side(x), p.dq, p.dc, x.phase_sums, x.row);
        write_backward<T, O>(x, t, key_side(x), p.dk, p.db, x.phase_sums, x.col);
        double* dg_t = dg + (batch * p.length + t) * G;
        float* dtheta = p.dtheta + (batch * p.length + t) * pairs;
        for (int64_t g = 0; g < G; ++g) {
          double total = 0;
          for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
            total += x.row[h];
            lam[h] += repeat == 1 ? x.row[h] + x.col[h] : x.row[h];
          }
          // Where the clamp binds, the exponent does not move with g.
          dg_t[g] = decay[g] += std::abs(x.exponent[g]) <= p.clamp ? total - x.col[g] : 0.0;
        }
        for (int64_t i = 0; i < pairs; ++i) dtheta[i] = static_cast<float>(x.phase_sums[i]);
      }
    });
    std::copy_n(static_cast<const double*>(x.phase_sums), pairs, phase);
  });

  // The sums of the pieces become what each piece's own sums lack: those of the segment's later pieces, and its flux.
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const auto chain = [&](double* sums, const double* flux, int64_t size) {
      std::vector<double> carry(size);
      for (int64_t n = count - 1; n >= 0; --n) {
        const int64_t segment = pieces[n].segment;
        if (n == count - 1 || pieces[n + 1].segment != segment) {
          for (int64_t i = 0; i < size; ++i) carry[i] = flux ? flux[(batch * p.segments + segment) * size + i] : 0;
        }
        double* sum = sums + (batch * count + n) * size;
        for (int64_t i = 0; i < size; ++i) sum[i] = std::exchange(carry[i], carry[i] + sum[i]);
      }
    };
    chain(decay_sums, p.decay_flux, G);
    chain(phase_sums, p.phase_flux, pairs);
  }
  for_each_piece(p, count, [] { return 0; }, [&](int, int64_t batch, int64_t n) {
    const double *decay = decay_sums + (batch * count + n) * G, *phase = phase_sums + (batch * count + n) * pairs;
    for (int64_t t = pieces[n].begin; t < pieces[n].end; ++t) {
      const int64_t row = batch * p.length + t;
      for (int64_t g = 0; g < G; ++g) p.dlog_decay[row * G + g] = static_cast<float>(dg[row * G + g] + decay[g]);
      float* dtheta = p.dtheta + row * pairs;
      for (int64_t i = 0; i < pairs; ++i) dtheta[i] = static_cast<float>(dtheta[i] + phase[i]);
    }
  });
  for (int64_t h = 0; h < p.heads; ++h) {
    double total = 0;
    for (int64_t n = 0; n < p.batch * count; ++n) total += lam_sums[n * p.heads + h];
    // s^2 = sqrt(head_width) lam, split evenly between query and key or all on the query.
    p.dlam[h] = static_cast<float>(total / ((repeat == 1 ? 2.0 : 1.0) * p.lam[h]));
  }
}

const char* vector_isa() {
#if defined(CPU_CAPABILITY_AVX512)
  return "AVX512";
#elif defined(CPU_CAPABILITY_AVX2)
  return "AVX2";
#else
  return "DEFAULT";
#endif
}

}  // namespace sisa::cpu
