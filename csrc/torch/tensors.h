// Tensors by torch's stable ABI: their checks, and how they become what the kernels take.
//
// Wrong arguments meet ValueError and TypeError in Python (sisa_kernels/checks.py). The checks here, which can raise but RuntimeError,
// are for direct calls of torch.ops.sisa.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "../sisa.h"

namespace sisa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

// ---- Argument checks: every message names the argument -------------------------------------------------------------------------

template <class... Parts>
[[noreturn]] void refuse(const Parts&... message) {
  std::ostringstream all;
  (all << ... << message);
  throw std::runtime_error(all.str());
}

#define SISA_CHECK(holds, ...) \
  if (!(holds)) refuse(__VA_ARGS__)

inline std::string text(const int64_t* numbers, size_t count) {
  std::string all;
  for (size_t n = 0; n < count; ++n) all += (n ? ", " : "") + std::to_string(numbers[n]);
  return "[" + all + "]";
}

inline std::string text(const Integers& numbers) {
  return text(numbers.data(), numbers.size());
}

inline std::string sizes(const Tensor& x) {
  return text(x.sizes().data(), x.sizes().size());
}

inline void check_tensor(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& q) {
  SISA_CHECK(x.device() == q.device(), name, " must be on the device of q");
  SISA_CHECK(x.layout() == torch::headeronly::Layout::Strided, name, " must be a dense tensor");
  const bool fits = std::equal(shape.begin(), shape.end(), x.sizes().begin(), x.sizes().end());
  SISA_CHECK(fits, name, " must have shape ", text(shape.begin(), shape.size()), ", got ", sizes(x));
  SISA_CHECK(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
}

inline void check_floating(const char* name, ScalarType dtype) {
  const bool fits = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  SISA_CHECK(fits, name, " must be Float, BFloat16 or Half here, got ", dtype);
}

// RoPE's tables [length, head width / 2], both or none.
inline void check_tables(const OptionalTensor& cos, const OptionalTensor& sin, int64_t length, const Tensor& q) {
  SISA_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (!cos) return;
  const int64_t width = q.size(3);
  SISA_CHECK(width % 2 == 0, "cos and sin need an even head width, got q with ", width, " channels");
  check_tensor("cos", *cos, {length, width / 2}, ScalarType::Float, q);
  check_tensor("sin", *sin, {length, width / 2}, ScalarType::Float, q);
}

// ---- Parameters ----------------------------------------------------------------------------------------------------------------

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, {shape.begin(), shape.size()}, dtype);
}

inline Tensor contiguous_like(const Tensor& x) {
  return torch::stable::new_empty(x, x.sizes());
}

inline DType kernel_dtype(ScalarType dtype) {
  return dtype == ScalarType::Float ? DType::float32 : dtype == ScalarType::BFloat16 ? DType::bfloat16 : DType::float16;
}

// [B, L, heads, channels], [B, L, heads] or a table [L, channels].
inline Rows rows(const Tensor& x) {
  Rows r;
  r.data = x.data_ptr();
  r.dtype = kernel_dtype(x.scalar_type());
  const bool table = x.dim() == 2;
  r.batch = table ? 0 : x.stride(0);
  r.token = x.stride(table ? 0 : 1);
  r.head = table ? 0 : x.stride(2);
  r.channel = x.dim() == 3 ? 1 : x.stride(x.dim() - 1);
  return r;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

}  // namespace sisa
