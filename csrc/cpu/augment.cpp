// The augmentation on the CPU: one pass over the inputs, forward and backward.
//
// The sequence is cut into pieces of at most kPiece tokens, none across a segment's boundary. The running sums are chained over
// the pieces in two passes (each piece's own sums, then their prefix), so that pieces run in parallel whatever the batch. How it
// is cut depends on the length and the segments alone: the result is the same bits for any number of threads.
//
// Within a piece, a token's rows (all heads) pass through buffers in the first-level cache as fp32, where the arithmetic is
// vectorised over heads and channels together. The sums of decay and phase are fp64.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

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

namespace sisa::cpu {

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t V = Vec::size();
constexpr int64_t kPiece = 32;

// ---- Rows -------------------------------------------------------------------------------------------------------------------

// Zeroed scratch, aligned to cache lines and padded so that loops may run over its end by two vectors of floats.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (size * sizeof(T) + 2 * V * sizeof(float) + 63) / 64 * 64;
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

template <class T>
void widen(const T* in, int64_t n, float* out) {
  using at::vec::Vectorized;
  for (int64_t i = 0; i < n; i += 2 * V) {
    const auto raw = n - i < 2 * V ? Vectorized<T>::loadu(in + i, n - i) : Vectorized<T>::loadu(in + i);
    const auto [lo, hi] = at::vec::convert_to_float<T>(raw);
    lo.store(out + i);
    hi.store(out + i + V);
  }
}

template <>
void widen(const float* in, int64_t n, float* out) {
  std::memcpy(out, in, n * sizeof(float));
}

template <class T>
void narrow(const float* in, int64_t n, T* out) {
  for (int64_t i = 0; i < n; i += 2 * V) {
    const auto raw = at::vec::convert_from_float<T>(Vec::loadu(in + i), Vec::loadu(in + i + V));
    if (n - i < 2 * V) {
      raw.store(out + i, n - i);
    } else {
      raw.store(out + i);
    }
  }
}

template <>
void narrow(const float* in, int64_t n, float* out) {
  std::memcpy(out, in, n * sizeof(float));
}

template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float32: return f(static_cast<float*>(nullptr));
    case DType::bfloat16: return f(static_cast<at::BFloat16*>(nullptr));
    case DType::float16: return f(static_cast<at::Half*>(nullptr));
  }
}

// One token's channels [first, first + channels) of every head, packed into out [heads, channels] as fp32.
void load(const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t first, int64_t channels, float* out) {
  with_type(x.dtype, [&, heads, channels](auto* type) mutable {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* row = static_cast<const T*>(x.data) + batch * x.batch + token * x.token + first * x.channel;
    if (x.channel == 1 && x.head == channels) {
      channels *= heads;
      heads = 1;
    }
    for (int64_t h = 0; h < heads; ++h) {
      const T* in = row + h * x.head;
      float* to = out + h * channels;
      if (x.channel == 1) {
        widen(in, channels, to);
      } else {
        for (int64_t n = 0; n < channels; ++n) to[n] = static_cast<float>(in[n * x.channel]);
      }
    }
  });
}

// The reverse of load, into a tensor whose last stride is 1.
void store(const float* in, const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t first, int64_t channels) {
  with_type(x.dtype, [&, heads, channels](auto* type) mutable {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = static_cast<T*>(x.data) + batch * x.batch + token * x.token + first;
    if (x.head == channels) {
      channels *= heads;
      heads = 1;
    }
    for (int64_t h = 0; h < heads; ++h) narrow(in + h * channels, channels, row + h * x.head);
  });
}

void store_zeros(const Rows& x, int64_t batch, int64_t token, int64_t heads, int64_t first, int64_t channels) {
  with_type(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T* row = static_cast<T*>(x.data) + batch * x.batch + token * x.token + first;
    for (int64_t h = 0; h < heads; ++h) std::memset(row + h * x.head, 0, channels * sizeof(T));
  });
}

// ---- Arithmetic on rows of channel pairs, n of them --------------------------------------------------------------------------

Pair<Vec> load_pairs(const float* x) {
  const auto [x0, x1] = at::vec::deinterleave2(Vec::loadu(x), Vec::loadu(x + V));
  return {x0, x1};
}

void store_pairs(Pair<Vec> x, float* out) {
  const auto [lo, hi] = at::vec::interleave2(x.x0, x.x1);
  lo.store(out);
  hi.store(out + V);
}

void rotate_row(float* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0; i < n; i += V)
    store_pairs(rotate(load_pairs(x + 2 * i), Vec::loadu(cos + i), Vec::loadu(sin + i)), x + 2 * i);
}

void unrotate_row(float* x, const float* cos, const float* sin, int64_t n) {
  for (int64_t i = 0; i < n; i += V)
    store_pairs(unrotate(load_pairs(x + 2 * i), Vec::loadu(cos + i), Vec::loadu(sin + i)), x + 2 * i);
}

void augment_row(float* x, const float* cos, const float* sin, const float* factor, int64_t n) {
  for (int64_t i = 0; i < n; i += V) {
    const auto rotated = rotate(load_pairs(x + 2 * i), Vec::loadu(cos + i), Vec::loadu(sin + i));
    store_pairs(Vec::loadu(factor + i) * rotated, x + 2 * i);
  }
}

// x becomes its gradient, given that of factor R(phase) x; the pairs' shares of dL/dexponent and dL/dphase are kept in fp64,
// since long sums of both follow.
void augment_row_backward(
    float* x, const float* dx, const float* cos, const float* sin, const float* factor, int64_t n, double* dexponent, double* dphase) {
  alignas(64) float part[4][V];
  for (int64_t i = 0; i < n; i += V) {
    const Vec c = Vec::loadu(cos + i), s = Vec::loadu(sin + i);
    const auto u = rotate(load_pairs(x + 2 * i), c, s);
    const auto du = Vec::loadu(factor + i) * load_pairs(dx + 2 * i);
    store_pairs(unrotate(du, c, s), x + 2 * i);
    u.x0.store(part[0]);
    u.x1.store(part[1]);
    du.x0.store(part[2]);
    du.x1.store(part[3]);
    for (int64_t j = 0; j < V; ++j) {
      const Pair<double> value{part[0][j], part[1][j]}, derivative{part[2][j], part[3][j]};
      dexponent[i + j] = d_exponent(derivative, value);
      dphase[i + j] = d_phase(derivative, value);
    }
  }
}

// Cosines and sines of phases wrapped to [-pi, pi].
void sincos_row(const float* phase, int64_t n, float* cos, float* sin) {
  for (int64_t i = 0; i < n; i += V) {
    const Vec x = Vec::loadu(phase + i);
#if defined(CPU_CAPABILITY_AVX512)
    const auto result = Sleef_sincosf16_u10(x);
    const Vec s = result.x, c = result.y;
#elif defined(CPU_CAPABILITY_AVX2)
    const auto result = Sleef_sincosf8_u10(x);
    const Vec s = result.x, c = result.y;
#else
    const Vec s = x.sin(), c = x.cos();
#endif
    c.store(cos + i);
    s.store(sin + i);
  }
}

double sum(const double* x, int64_t n) {
  double total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
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
        [&](float* row, int64_t batch, int64_t n) { sum_piece(batch, pieces[n], n, row); });
    at::parallel_for(0, p.batch * p.key_heads, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t i = lo; i < hi; ++i) chain(pieces, i / p.key_heads, i % p.key_heads);
    });
  }

  double* local(int64_t batch, int64_t token) const { return local_ + (batch * p_.length + token) * p_.key_heads; }
  double* base(int64_t batch, int64_t piece) const { return base_ + (batch * pieces_ + piece) * p_.key_heads; }
  double* phase(int64_t batch, int64_t piece) const { return phase_ + (batch * (pieces_ + 1) + piece) * pairs_; }

 private:
  // local() of the piece's tokens, and its sum of theta in the place of the next piece's phase.
  void sum_piece(int64_t batch, const Piece& piece, int64_t index, float* row) {
    double* total = phase(batch, index + 1);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      load(p_.log_decay, batch, t, p_.key_heads, 0, 1, row);
      double* here = local(batch, t);
      for (int64_t g = 0; g < p_.key_heads; ++g) {
        here[g] = bounded_log_decay(row[g]);
        if (t > piece.begin) here[g] += here[g - p_.key_heads];
      }
      load(p_.theta, batch, t, p_.key_heads, 0, p_.state_width / 2, row);
      for (int64_t i = 0; i < pairs_; ++i) total[i] += row[i];
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

// ---- A thread's work ---------------------------------------------------------------------------------------------------------

// The factors, cosines and sines of one token, expanded to all pairs of its row, and buffers for the rows themselves.
struct Token {
  const AugmentParams& p;
  const Scans& scans;
  const int64_t width = p.state_width / 2, query_pairs = p.heads * width, key_pairs = p.key_heads * width;
  const int64_t half = p.cos.data ? p.head_width / 2 : 0;  // rotary pairs of a head
  int64_t batch = 0, piece = 0;
  Buffer<float> head_row{p.heads * p.head_width}, state_row{p.heads * p.state_width};
  Buffer<float> cos_q{query_pairs}, sin_q{query_pairs}, factor_q{query_pairs};
  Buffer<float> cos_k{key_pairs}, sin_k{key_pairs}, factor_k{key_pairs};
  Buffer<float> cos_rotary{p.heads * half}, sin_rotary{p.heads * half};
  Buffer<float> theta{key_pairs}, wrapped{key_pairs};
  Buffer<double> phase{key_pairs}, exponent{p.key_heads}, growth{p.key_heads};  // exponent: g - m, not clamped
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
    std::memcpy(phase, scans.phase(batch, forward ? piece : piece + 1), key_pairs * sizeof(double));
  }

  void forward_to(int64_t token) {
    load(p.theta, batch, token, p.key_heads, 0, width, theta);
    for (int64_t i = 0; i < key_pairs; ++i) phase[i] += theta[i];
    set(token);
  }

  void back_to(int64_t token) {
    set(token);
    load(p.theta, batch, token, p.key_heads, 0, width, theta);
    for (int64_t i = 0; i < key_pairs; ++i) phase[i] -= theta[i];
  }

  void set(int64_t token) {
    for (int64_t i = 0; i < key_pairs; ++i) wrapped[i] = static_cast<float>(phase[i] = wrap(phase[i]));
    sincos_row(wrapped, key_pairs, cos_k, sin_k);
    const double *local = scans.local(batch, token), *base = scans.base(batch, piece);
    for (int64_t g = 0; g < p.key_heads; ++g) growth[g] = clamped(exponent[g] = local[g] + base[g], p.clamp);
    using Double = at::vec::Vectorized<double>;
    for (int64_t g = 0; g < p.key_heads; g += Double::size()) Double::loadu(growth + g).exp().store(growth + g);
    for (int64_t g = 0, repeat = p.heads / p.key_heads; g < p.key_heads; ++g) {
      std::fill_n(factor_k + g * width, width, static_cast<float>(scale_k[g] / growth[g]));
      for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
        std::fill_n(factor_q + h * width, width, static_cast<float>(scale_q[h] * growth[g]));
        std::memcpy(cos_q + h * width, cos_k + g * width, width * sizeof(float));
        std::memcpy(sin_q + h * width, sin_k + g * width, width * sizeof(float));
      }
    }
    for (int64_t h = 0; half > 0 && h < p.heads; ++h) {
      load(p.cos, 0, token, 1, 0, half, cos_rotary + h * half);
      load(p.sin, 0, token, 1, 0, half, sin_rotary + h * half);
    }
  }
};

// A token's queries or keys: what differs between the two.
struct Side {
  int64_t heads;
  const Rows &head, &state, &augmented;  // q, c, q_aug or k, b, k_aug
  const float *cos, *sin, *factor;
};

Side query_side(const Token& x) {
  return {x.p.heads, x.p.q, x.p.c, x.p.q_aug, x.cos_q, x.sin_q, x.factor_q};
}

Side key_side(const Token& x) {
  return {x.p.key_heads, x.p.k, x.p.b, x.p.k_aug, x.cos_k, x.sin_k, x.factor_k};
}

void write(Token& x, int64_t token, const Side& side) {
  const AugmentParams& p = x.p;
  load(side.head, x.batch, token, side.heads, 0, p.head_width, x.head_row);
  rotate_row(x.head_row, x.cos_rotary, x.sin_rotary, side.heads * x.half);
  store(x.head_row, side.augmented, x.batch, token, side.heads, 0, p.head_width);
  load(side.state, x.batch, token, side.heads, 0, p.state_width, x.state_row);
  augment_row(x.state_row, side.cos, side.sin, side.factor, side.heads * x.width);
  store(x.state_row, side.augmented, x.batch, token, side.heads, p.head_width, p.state_width);
  const int64_t used = p.head_width + p.state_width;
  if (p.width > used) store_zeros(side.augmented, x.batch, token, side.heads, used, p.width - used);
}

// The backward's buffers on top of a token's: the gradients read, and the running sums from the piece's end back.
struct BackwardToken : Token {
  Buffer<float> gradient{p.heads * p.state_width};
  Buffer<double> dexponent{query_pairs}, dphase_q{query_pairs}, dphase_k{key_pairs};
  Buffer<double> row{p.heads}, col{p.key_heads};
  using Token::Token;
};

// Writes the gradients of one side's head and state rows; leaves dL/dexponent of each head and dL/dphase of each pair.
void write_backward(
    BackwardToken& x, int64_t token, const Side& side, const Rows& dhead, const Rows& dstate, double* dexponent, double* dphase) {
  const AugmentParams& p = x.p;
  load(side.augmented, x.batch, token, side.heads, 0, p.head_width, x.head_row);
  unrotate_row(x.head_row, x.cos_rotary, x.sin_rotary, side.heads * x.half);
  store(x.head_row, dhead, x.batch, token, side.heads, 0, p.head_width);
  load(side.augmented, x.batch, token, side.heads, p.head_width, p.state_width, x.gradient);
  load(side.state, x.batch, token, side.heads, 0, p.state_width, x.state_row);
  augment_row_backward(x.state_row, x.gradient, side.cos, side.sin, side.factor, side.heads * x.width, x.dexponent, dphase);
  store(x.state_row, dstate, x.batch, token, side.heads, 0, p.state_width);
  for (int64_t h = 0; h < side.heads; ++h) dexponent[h] = sum(x.dexponent + h * x.width, x.width);
}

}  // namespace

void augment(const AugmentParams& p) {
  const std::vector<Piece> pieces = cut(p);
  const Scans scans(p, pieces);
  for_each_piece(p, pieces.size(), [&] { return Token(p, scans); }, [&](Token& x, int64_t batch, int64_t n) {
    x.enter(batch, n, true);
    for (int64_t t = pieces[n].begin; t < pieces[n].end; ++t) {
      x.forward_to(t);
      write(x, t, query_side(x));
      write(x, t, key_side(x));
    }
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
    for (int64_t t = pieces[n].end - 1; t >= pieces[n].begin; --t) {
      x.back_to(t);
      write_backward(x, t, query_side(x), p.dq, p.dc, x.row, x.dphase_q);
      write_backward(x, t, key_side(x), p.dk, p.db, x.col, x.dphase_k);
      double* dg_t = dg + (batch * p.length + t) * G;
      float* dtheta = p.dtheta + (batch * p.length + t) * pairs;
      for (int64_t g = 0; g < G; ++g) {
        double total = 0;
        for (int64_t h = g * repeat; h < (g + 1) * repeat; ++h) {
          total += x.row[h];
          lam[h] += repeat == 1 ? x.row[h] + x.col[h] : x.row[h];
          for (int64_t i = 0; i < width; ++i) phase[g * width + i] += x.dphase_q[h * width + i];
        }
        // Where the clamp binds, the exponent does not move with g.
        dg_t[g] = decay[g] += std::abs(x.exponent[g]) <= p.clamp ? total - x.col[g] : 0.0;
      }
      for (int64_t i = 0; i < pairs; ++i) dtheta[i] = static_cast<float>(phase[i] += x.dphase_k[i]);
    }
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
