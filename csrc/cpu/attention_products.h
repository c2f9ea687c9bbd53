// Products of tiles: R rows by N vectors of a result at a time in registers, the left operand broadcast number by number, the
// right one loaded by vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace sisa::cpu::SISA_ISA {

constexpr int64_t kTile = 64;  // tokens

struct Span {
  int64_t begin, end;
};

constexpr int kColumns = V == 16 ? 4 : 2;  // the widest block, in vectors

// Rows of a block that is N vectors wide: as many as the registers hold beside a row of the right operand.
template <int N>
constexpr int kBlockRows = V == 16 ? (N == 4 ? 4 : N == 1 ? 16 : 8) : (N == 2 ? 6 : 12);

// Calls body(row, R) over blocks of R rows, then over ever smaller ones for what is left.
template <int R, class F>
SISA_INLINE void for_blocks(Span rows, F body) {
  int64_t row = rows.begin;
  for (; row + R <= rows.end; row += R) body(row, std::integral_constant<int, R>());
  if constexpr (R > 1) {
    if (row < rows.end) for_blocks<(R > 8 ? R / 2 : R > 4 ? 4 : R / 2)>({row, rows.end}, body);
  }
}

// Keeps the compiler from making one pointer of this for each use: those would take the registers of vectors.
template <class T>
SISA_INLINE void pin(T*& x) {
  asm("" : "+r"(x));
}

// acc[r][n] += a_rk b_kn over k. a_rk is a[r][k], or a[k][r] if transposed.
template <bool kTransposed, int R, int N>
SISA_INLINE void accumulate(Vec (&acc)[R][N], const float* a, int64_t a_stride, const float* b, int64_t b_stride, Span depth) {
  constexpr int kQuads = (R + 3) / 4;
  const float* quads[kQuads];  // every fourth row of a
  for (int i = 0; i < kQuads; ++i) quads[i] = a + 4 * i * a_stride + depth.begin;
#pragma GCC unroll 1
  for (int64_t k = depth.begin; k < depth.end; ++k) {
    Vec row[N];
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) row[n] = load(b + k * b_stride + n * V), pin(row[n]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vec x = broadcast(kTransposed ? a[k * a_stride + r] : quads[r / 4][r % 4 * a_stride]);
      if (N > 1) pin(x);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[r][n] = fma(x, row[n], acc[r][n]);
    }
#pragma GCC unroll 16
    for (int i = 0; !kTransposed && i < kQuads; ++i) ++quads[i], pin(quads[i]);
  }
}

// Which a_rk count: all, those on and below the diagonal, or those on and above. The others are not read, so that what is not a
// number there, or in the rows of b that they belong to, stays there.
enum class Part { whole, lower, upper };

template <bool kTransposed, Part part, int R, int N>
SISA_INLINE void product_block(
    const float* a, const float* b, int64_t width, int64_t row, Span depth, float scale, float* out) {
  Vec acc[R][N] = {};
  const float* rows = a + (kTransposed ? row : row * kTile);
  Span all = depth;
  if constexpr (part == Part::lower) all.end = std::min(depth.end, row + 1);
  if constexpr (part == Part::upper) all.begin = std::max(depth.begin, row + R - 1);
  accumulate<kTransposed>(acc, rows, kTile, b, width, all);
  if constexpr (part != Part::whole) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Span rest = part == Part::lower ? Span{all.end, std::min(depth.end, row + r + 1)}
                                            : Span{std::max(depth.begin, row + r), std::min(depth.end, all.begin)};
      for (int64_t k = rest.begin; k < rest.end; ++k) {
        const Vec x = broadcast(kTransposed ? rows[k * kTile + r] : rows[r * kTile + k]);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) acc[r][n] = fma(x, load(b + k * width + n * V), acc[r][n]);
      }
    }
  }
  asm("" : "+m"(scale));  // loaded here, it takes no register above
  float* to = out + row * width;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, to += width, pin(to)) {
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) store(fma(acc[r][n], broadcast(scale), load(to + n * V)), to + n * V);
  }
}

template <bool kTransposed, Part part, int N>
void product_columns(const float* a, const float* b, int64_t width, Span rows, Span depth, float scale, float* out) {
  for_blocks<kBlockRows<N>>(rows, [&]<int R>(int64_t row, std::integral_constant<int, R>) __attribute__((always_inline)) {
    product_block<kTransposed, part, R, N>(a, b, width, row, depth, scale, out);
  });
}

// out += scale a b in the given rows. a is a whole tile, b and out have rows of `width` channels, a whole number of vectors.
template <bool kTransposed, Part part>
void product(const float* a, const float* b, int64_t width, Span rows, Span depth, float scale, float* out) {
  int64_t n = 0;
  for (; n + kColumns * V <= width; n += kColumns * V) {
    product_columns<kTransposed, part, kColumns>(a, b + n, width, rows, depth, scale, out + n);
  }
  const int64_t rest = (width - n) / V;
  if constexpr (kColumns > 3) {
    if (rest == 3) product_columns<kTransposed, part, 3>(a, b + n, width, rows, depth, scale, out + n);
    if (rest == 2) product_columns<kTransposed, part, 2>(a, b + n, width, rows, depth, scale, out + n);
  }
  if (rest == 1) product_columns<kTransposed, part, 1>(a, b + n, width, rows, depth, scale, out + n);
}

}  // namespace sisa::cpu::SISA_ISA
