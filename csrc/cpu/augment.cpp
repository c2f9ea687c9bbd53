// The augmentation on the CPU: one pass over the inputs, forward and backward.
//
// The sequence is cut into pieces of at most kPiece tokens, none across a segment's boundary. The running sums are chained over
// the pieces in two passes (each piece's own sums, then their prefix), so that pieces run in parallel whatever the batch. How it
// is cut depends on the length and the segments alone: the result is the same bits for any number of threads.
//
// Within a piece each token is taken with all its heads, whose rows usually lie side by side. Arithmetic is fp32 in registers
// between the inputs and the results, but for the sums of decay and phase and of their gradients, which are fp64.

#include <algorithm>
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

constexpr int64_t kPiece = 32;               // tokens
constexpr int64_t kStreamedBytes = 1 << 20;  // about a core's second-level cache

// ---- A token's rows, one a head ------------------------------------------------------------------------------------------------

// A row a head; the channels lie side by side.
template <class T>
struct Heads {
  T* data;
  int64_t stride;
  int64_t ahead = 0;      // of an input: to the same channels of the next token
  bool streamed = false;  // a result to be written past the caches

  Heads row(int64_t head) const { return from(head * stride); }
  Heads from(int64_t channel) const { return {data + channel, stride, ahead, streamed}; }

  // V channels or the count that are left. The next token's are asked for, since more streams run side by side than the hardware
  // follows; into the second-level cache, since wide states fill the first.
  template <class Count>
  Vec get(int64_t i, Count count) const {
    __builtin_prefetch(data + i + ahead, 0, 2);
    return load(data + i, count);
  }

  template <class Count>
  void put(Vec x, int64_t i, Count count) const {
    store(x, data + i, count, streamed);
  }
};

// A token's rows of an input, in place where the last stride is 1, else gathered into scratch.
template <class T>
Heads<const T> input(const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t channels, float* scratch) {
  const T* in = static_cast<const T*>(x.data) + batch * x.batch + token * x.token;
  if (x.channel == 1) return {in, x.head, x.token};
  T* out = reinterpret_cast<T*>(scratch);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t n = 0; n < channels; ++n) out[h * channels + n] = in[h * x.head + n * x.channel];
  }
  return {out, channels};
}

// A token's rows of a result; results are contiguous. Where they are too large together to stay in the caches they are written
// past them, if whole vectors make whole cache lines: fetching the lines to be overwritten would take as long as writing them.
template <class T>
Heads<T> result(const AugmentParams& p, const Rows& x, int64_t batch, int64_t token, int64_t channels) {
  T* out = static_cast<T*>(x.data) + batch * x.batch + token * x.token;
  const int64_t size = sizeof(T);
  const bool large = p.batch * p.length * p.heads * p.width * size >= kStreamedBytes;
  const bool lines = (reinterpret_cast<uintptr_t>(out) | (x.token * size)) % 64 == 0 && (x.head | channels) % V == 0;
  return {out, x.head, 0, large && lines};
}

// An fp32 tensor's row with its heads packed.
const float* packed(const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t channels, float* scratch) {
  const Heads<const float> in = input<float>(x, batch, token, heads, channels, scratch);
  if (in.stride == channels || heads == 1) return in.data;
  for (int64_t h = 0; h < heads; ++h) std::copy_n(in.row(h).data, channels, scratch + h * channels);
  return scratch;
}

// Cosines and signed sines of each channel (augment_math.h), padded.
struct Angles {
  const float *cos, *sin;
};

template <class T, class O>
void copy_row(Heads<const T> in, Heads<O> out, int64_t channels) {
  for_channels(channels, [&](int64_t i, auto count) { out.put(in.get(i, count), i, count); });
}

template <bool inverse, class T, class O>
void rotate_row(Heads<const T> in, Heads<O> out, Angles angles, int64_t channels) {
  for_channels(channels, [&](int64_t i, auto count) {
    const Vec x = in.get(i, count), c = load(angles.cos + i), s = load(angles.sin + i);
    out.put(inverse ? unrotate(x, partners(x), c, s) : rotate(x, partners(x), c, s), i, count);
  });
}

template <class T, class O>
void augment_row(Heads<const T> in, Heads<O> out, Angles angles, float factor, int64_t channels) {
  for_channels(channels, [&](int64_t i, auto count) {
    const Vec x = in.get(i, count), c = load(angles.cos + i), s = load(angles.sin + i);
    out.put(factor * rotate(x, partners(x), c, s), i, count);
  });
}

// The gradient of augment_row from x and that of its result; adds each pair's dL/dphase to dphase and returns dL/dexponent.
template <class T, class O>
double augment_row_backward(
    Heads<const T> x, Heads<const O> dy, Heads<T> dx, Angles angles, float factor, int64_t channels, double* dphase) {
  Dot dot;
  for_channels(channels, [&](int64_t i, auto count) {
    const Vec value = x.get(i, count), c = load(angles.cos + i), s = load(angles.sin + i);
    const Vec u = rotate(value, partners(value), c, s), du = factor * dy.get(i, count);
    dx.put(unrotate(du, partners(du), c, s), i, count);
    dot.add(u, du);
    add_even(d_phase(u, partners(u), du, partners(du)), dphase + i / 2);
  });
  return dot.total();
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
  parallel_for(0, p.batch * pieces, 1, [&](int64_t lo, int64_t hi) {
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
    parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t lo, int64_t hi) {
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
  Buffer<float> cos_rotary{2 * half}, sin_rotary{2 * half}, scratch{p.heads * (p.head_width + p.state_width)};
  Buffer<float> scratch_state{p.heads * p.state_width};
  Buffer<double> phase{p.key_heads * pairs}, exponent{p.key_heads}, growth{p.key_heads};  // exponent: g - m, not clamped
  Buffer<double> scale_q{p.heads}, scale_k{p.key_heads};

  Token(const AugmentParams& params, const Scans& sums) : p(params), scans(sums) {
    const bool shared = p.heads != p.key_heads;
    for (int64_t h = 0; h < p.heads; ++h) scale_q[h] = query_scale(p.head_width, p.lam[h], shared);
    for (int64_t g = 0; g < p.key_heads; ++g) scale_k[g] = key_scale(p.head_width, p.lam[g], shared);
  }

  // Before a walk over the piece's tokens.
  void enter(int64_t batch_index, int64_t piece_index) {
    batch = batch_index;
    piece = piece_index;
    std::copy_n(scans.phase(batch, piece), p.key_heads * pairs, static_cast<double*>(phase));
  }

  void go_to(int64_t token) {
    const float* theta = packed(p.theta, batch, token, p.key_heads, pairs, scratch);
    double* sum = phase;
    for (int64_t i = 0; i < p.key_heads * pairs; ++i) sum[i] += theta[i];
    cos_sin(phase, p.key_heads * pairs, cos, sin);
    const double *local = scans.local(batch, token), *base = scans.base(batch, piece);
    for (int64_t g = 0; g < p.key_heads; ++g) growth[g] = clamped(exponent[g] = local[g] + base[g], p.clamp);
    exp(growth, p.key_heads);
    for (int64_t g = 0; g < p.key_heads; ++g) {
      factor_k[g] = static_cast<float>(scale_k[g] / growth[g]);
      for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) factor_q[h] = static_cast<float>(scale_q[h] * growth[g]);
    }
    if (half == 0) return;
    const float* c = packed(p.cos, 0, token, 1, half, scratch);
    const float* s = packed(p.sin, 0, token, 1, half, scratch + half);
    for (int64_t i = 0; i < half; ++i) expand(c[i], s[i], cos_rotary + 2 * i, sin_rotary + 2 * i);
  }

  Angles rotary() const { return {cos_rotary, sin_rotary}; }
  Angles phases(int64_t group) const { return {cos + group * p.state_width, sin + group * p.state_width}; }
};

// A token's queries or keys: what differs between the two.
struct Side {
  int64_t repeat;                        // heads that share a phase
  const Rows &head, &state, &augmented;  // q, c, q_aug or k, b, k_aug
  const float* factors;
};

Side query_side(const Token& x) {
  return {x.repeat, x.p.q, x.p.c, x.p.q_aug, x.factor_q};
}

Side key_side(const Token& x) {
  return {1, x.p.k, x.p.b, x.p.k_aug, x.factor_k};
}

// A head's row is written from end to end before the next, so that rows which share a cache line meet in the write buffer.
template <class T, class O>
void write(Token& x, int64_t token, const Side& side) {
  const AugmentParams& p = x.p;
  const int64_t heads = p.key_heads * side.repeat, used = p.head_width + p.state_width;
  const auto head = input<T>(side.head, x.batch, token, heads, p.head_width, x.scratch);
  const auto state = input<T>(side.state, x.batch, token, heads, p.state_width, x.scratch_state);
  const auto augmented = result<O>(p, side.augmented, x.batch, token, p.head_width);
  for (int64_t h = 0, group = 0; group < p.key_heads; ++group) {
    for (const int64_t end = h + side.repeat; h < end; ++h) {
      const Heads<O> out = augmented.row(h);
      if (x.half) {
        rotate_row<false>(head.row(h), out, x.rotary(), p.head_width);
      } else {
        copy_row(head.row(h), out, p.head_width);
      }
      augment_row(state.row(h), out.from(p.head_width), x.phases(group), side.factors[h], p.state_width);
      if (p.width > used) std::fill_n(out.from(used).data, p.width - used, O(0));
    }
  }
}

// A backward token's own dL/dphase and dL/dexponent, of the queries and of the keys.
struct BackwardToken : Token {
  Buffer<double> dphase{p.key_heads * pairs}, row{p.heads}, col{p.key_heads};
  using Token::Token;
};

// Writes the gradients of one side's head and state rows, adds to dphase and returns each head's dL/dexponent.
template <class T, class O>
void write_backward(
    BackwardToken& x, int64_t token, const Side& side, const Rows& dhead, const Rows& dstate, double* dexponent) {
  const AugmentParams& p = x.p;
  const int64_t heads = p.key_heads * side.repeat;
  const auto augmented = input<O>(side.augmented, x.batch, token, heads, p.head_width + p.state_width, x.scratch);
  const auto state = input<T>(side.state, x.batch, token, heads, p.state_width, x.scratch_state);
  const auto head_out = result<T>(p, dhead, x.batch, token, p.head_width);
  const auto state_out = result<T>(p, dstate, x.batch, token, p.state_width);
  for (int64_t h = 0, group = 0; group < p.key_heads; ++group) {
    for (const int64_t end = h + side.repeat; h < end; ++h) {
      const Heads<const O> in = augmented.row(h);
      if (x.half) {
        rotate_row<true>(in, head_out.row(h), x.rotary(), p.head_width);
      } else {
        copy_row(in, head_out.row(h), p.head_width);
      }
      dexponent[h] = augment_row_backward(
          state.row(h), in.from(p.head_width), state_out.row(h), x.phases(group), side.factors[h], p.state_width,
          x.dphase + group * x.pairs);
    }
  }
}

}  // namespace

void augment(const AugmentParams& p) {
  const std::vector<Piece> pieces = cut(p);
  const Scans scans(p, pieces);
  for_each_piece(p, pieces.size(), [&] { return Token(p, scans); }, [&](Token& x, int64_t batch, int64_t n) {
    x.enter(batch, n);
    with_types<BFloat16, Half>(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
      for (int64_t t = pieces[n].begin; t < pieces[n].end; ++t) {
        x.go_to(t);
        write<T, O>(x, t, query_side(x));
        write<T, O>(x, t, key_side(x));
      }
    });
  });
}

// Adds to dL/dg, and to its sums over the pieces, what comes through m, the mean of the largest and smallest g of each segment. As
// amax and amin have it, all tokens of the largest g share its gradient evenly, and those of the smallest: runs without decay at the
// segment's ends.
void add_through_middle(const AugmentParams& p, const std::vector<Piece>& pieces, double* dg, double* sums) {
  const int64_t count = pieces.size(), G = p.key_heads;
  parallel_for(0, p.batch * G, 1, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) {
      const int64_t batch = i / G, g = i % G;
      const float* log_decay = static_cast<const float*>(p.log_decay.data) + batch * p.log_decay.batch + g * p.log_decay.head;
      for (int64_t first = 0, n = 0; n < count; first = n) {
        double direct = 0;
        for (; n < count && pieces[n].segment == pieces[first].segment; ++n) direct += sums[(batch * count + n) * G + g];
        const int64_t begin = pieces[first].begin, end = pieces[n - 1].end;
        const auto share = [&](int64_t from, int64_t to) {
          for (int64_t t = from; t < to; ++t) {
            const double part = -direct / 2 / (to - from);
            dg[(batch * p.length + t) * G + g] += part;
            sums[(batch * count + first + (t - begin) / kPiece) * G + g] += part;
          }
        };
        const Extremes extremes = extremes_of(log_decay, p.log_decay.token, begin, end);
        share(begin, extremes.largest_end);
        share(extremes.smallest_begin, end);
      }
    }
  });
}

// Each piece is walked forward, which memory serves twice as fast as backward, and leaves each token's own dL/dg and dL/dphase and
// their sums over the piece. Once these sums are chained from the last piece to the first, a last pass makes the reverse running
// sums of them.
void augment_backward(const AugmentBackwardParams& p) {
  const std::vector<Piece> pieces = cut(p);
  const Scans scans(p, pieces);
  const int64_t count = pieces.size(), G = p.key_heads, width = p.state_width / 2, pairs = G * width, repeat = p.heads / G;
  const Buffer<double> decay_sums(p.batch * count * G), phase_sums(p.batch * count * pairs), lam_sums(p.batch * count * p.heads);
  const Buffer<double> dg(p.batch * p.length * G);

  for_each_piece(p, count, [&] { return BackwardToken(p, scans); }, [&](BackwardToken& x, int64_t batch, int64_t n) {
    double *decay = decay_sums + (batch * count + n) * G, *phase = phase_sums + (batch * count + n) * pairs;
    double* lam = lam_sums + (batch * count + n) * p.heads;
    x.enter(batch, n);
    with_types<BFloat16, Half>(p, [&]<class T, class O>(std::type_identity<T>, std::type_identity<O>) {
      for (int64_t t = pieces[n].begin; t < pieces[n].end; ++t) {
        x.go_to(t);
        write_backward<T, O>(x, t, query_side(x), p.dq, p.dc, x.row);
        write_backward<T, O>(x, t, key_side(x), p.dk, p.db, x.col);
        double* dg_t = dg + (batch * p.length + t) * G;
        float* dtheta = p.dtheta + (batch * p.length + t) * pairs;
        for (int64_t g = 0; g < G; ++g) {
          double total = 0;
          for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
            total += x.row[h];
            lam[h] += repeat == 1 ? x.row[h] + x.col[h] : x.row[h];
          }
          // Where the clamp binds, the exponent does not move with g.
          dg_t[g] = std::abs(x.exponent[g]) <= p.clamp ? total - x.col[g] : 0.0;
          decay[g] += dg_t[g];
        }
        double* dphase = x.dphase;
        for (int64_t i = 0; i < pairs; ++i) {
          phase[i] += dphase[i];
          dtheta[i] = static_cast<float>(std::exchange(dphase[i], 0));
        }
      }
    });
  });

  if (p.clamp < INFINITY) add_through_middle(p, pieces, dg, decay_sums);

  // The sums of the pieces become what comes after each piece: the segment's later pieces and its flux.
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    const auto chain = [&](double* sums, const double* flux, int64_t size) {
      Buffer<double> carry(size);
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
    double *decay = decay_sums + (batch * count + n) * G, *phase = phase_sums + (batch * count + n) * pairs;
    for (int64_t t = pieces[n].end - 1; t >= pieces[n].begin; --t) {
      const int64_t row = batch * p.length + t;
      for (int64_t g = 0; g < G; ++g) p.dlog_decay[row * G + g] = static_cast<float>(decay[g] += dg[row * G + g]);
      float* dtheta = p.dtheta + row * pairs;
      for (int64_t i = 0; i < pairs; ++i) dtheta[i] = static_cast<float>(phase[i] += dtheta[i]);
    }
  });
  for (int64_t h = 0; h < p.heads; ++h) {
    double total = 0;
    for (int64_t n = 0; n < p.batch * count; ++n) total += lam_sums[n * p.heads + h];
    p.dlam[h] = static_cast<float>(d_lam(total, p.lam[h], repeat > 1));
  }
}

}  // namespace sisa::cpu::SISA_ISA
