// Products of tiles: R rows by N vectors of a result at a time in registers, the left operand broadcast number by number, the
// right one loaded by vectors.
#pragma once

#include <algorithm>
#include <type_traits>

#include "attention_bf16.h"
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
template <bool kTransposed, class Number = Single, int R, int N>
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
      Vec x = Number::broadcast(kTransposed ? a[k * a_stride + r] : quads[r / 4][r % 4 * a_stride]);
      if (N > 1) pin(x);
#pragma GCC unroll 16
      for (int n = 0; n < N; ++n) acc[r][n] = Number::fma(x, row[n], acc[r][n]);
    }
#pragma GCC unroll 16
    for (int i = 0; !kTransposed && i < kQuads; ++i) ++quads[i], pin(quads[i]);
  }
}

// Which a_rk count: all, those on and below the diagonal, or those on and above. The others are not read, so that what is not a
// number there, or in the rows of b that they belong to, stays there.
enum class Part { whole, lower, upper };

template <bool kTransposed, Part part, class Number, int R, int N>
SISA_INLINE void product_block(
    const float* a, const float* b, int64_t width, int64_t row, Span depth, float scale, float* out) {
  constexpr int64_t kNumbers = Number::kNumbers, kStride = kTransposed ? kTile : kTile / kNumbers;
  Vec acc[R][N] = {};
  const float* rows = a + row * (kTransposed ? 1 : kStride);
  Span all = depth;
  if constexpr (part == Part::lower) all.end = std::min(depth.end, (row + 1) / kNumbers);
  if constexpr (part == Part::upper) all.begin = std::max(depth.begin, (row + R + kNumbers - 2) / kNumbers);
  accumulate<kTransposed, Number>(acc, rows, kStride, b, width, all);
  if constexpr (part != Part::whole) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int64_t own = (row + r) / kNumbers;
      const Span rest = part == Part::lower ? Span{all.end, std::min(depth.end, own + 1)}
                                            : Span{std::max(depth.begin, own), std::min(depth.end, all.begin)};
      for (int64_t k = rest.begin; k < rest.end; ++k) {
        const int64_t at = row + r - k * kNumbers;  // the diagonal, in what is at k
        const int64_t begin = part == Part::lower ? 0 : at, end = part == Part::lower ? at + 1 : kNumbers;
        const Vec x = Number::some(Number::broadcast(rows[kTransposed ? k * kStride + r : r * kStride + k]), begin, end);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
          acc[r][n] = Number::fma(x, Number::some(load(b + k * width + n * V), begin, end), acc[r][n]);
        }
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

template <bool kTransposed, Part part, class Number, int N>
void product_columns(const float* a, const float* b, int64_t width, Span rows, Span depth, float scale, float* out) {
  for_blocks<kBlockRows<N>>(rows, [&]<int R>(int64_t row, std::integral_constant<int, R>) __attribute__((always_inline)) {
    product_block<kTransposed, part, Number, R, N>(a, b, width, row, depth, scale, out);
  });
}

// out += scale a b in the given rows. a is a whole tile, b and out have rows of `width` channels, a whole number of vectors.
// The depth is in Numbers.
template <bool kTransposed, Part part, class Number = Single>
void product(const float* a, const float* b, int64_t width, Span rows, Span depth, float scale, float* out) {
  int64_t n = 0;
  for (; n + kColumns * V <= width; n += kColumns * V) {
    product_columns<kTransposed, part, Number, kColumns>(a, b + n, width, rows, depth, scale, out + n);
  }
  const int64_t rest = (width - n) / V;
  if constexpr (kColumns > 3) {
    if (rest == 3) product_columns<kTransposed, part, Number, 3>(a, b + n, width, rows, depth, scale, out + n);
    if (rest == 2) product_columns<kTransposed, part, Number, 2>(a, b + n, width, rows, depth, scale, out + n);
  }
  if (rest == 1) product_columns<kTransposed, part, Number, 1>(a, b + n, width, rows, depth, scale, out + n);
}

}  // namespace sisa::cpu::SISA_ISA
