// sisa::attention and its backward (sisa_kernels/paths/native.py).

#include <tuple>

#include "../attention.h"
#include "tensors.h"

namespace sisa {

namespace {

constexpr int64_t kMaxWidth = 256;  // of a head

struct Operands {
  const Tensor &q, &k, &v;
  const OptionalTensor &b, &c, &log_decay, &theta, &lam, &cos, &sin, &bounds;
  int64_t offset;

  Bias bias() const { return b ? Bias::importance : log_decay ? Bias::forget : Bias::none; }
};

void check_bounds(const Operands& x, Integers& bounds) {
  const Tensor& given = *x.bounds;
  const bool wide = given.scalar_type() == ScalarType::Long;
  SISA_CHECK(given.dim() == 1 && given.numel() >= 2 && given.is_contiguous(), "bounds must be [documents + 1], contiguous, got ", sizes(given));
  SISA_CHECK(wide || given.scalar_type() == ScalarType::Int, "bounds must be Int or Long, got ", given.scalar_type());
  SISA_CHECK(given.device() == x.q.device(), "bounds must be on the device of q");
  for (int64_t n = 0; n < given.numel(); ++n) bounds.push_back(wide ? data<int64_t>(given)[n] : data<int32_t>(given)[n]);
  const bool rises = std::is_sorted(bounds.begin(), bounds.end());
  SISA_CHECK(
      rises && bounds.front() == 0 && bounds.back() <= x.k.size(1), "bounds must rise from 0 to at most ", x.k.size(1), ", got ",
      text(bounds));
}

void check_width(const char* name, const Tensor& x) {
  SISA_CHECK(x.dim() == 4, name, " must be [batch, length, heads, channels], got ", sizes(x));
  SISA_CHECK(1 <= x.size(3) && x.size(3) <= kMaxWidth, name, " must have 1 to ", kMaxWidth, " channels, got ", sizes(x));
}

// Fills bounds with those given.
void check(const Operands& x, Integers& bounds) {
  const auto dtype = x.q.scalar_type();
  check_floating("q", dtype);
  check_width("q", x.q), check_width("k", x.k), check_width("v", x.v);
  SISA_CHECK(x.q.numel() > 0, "q must have no size of 0, got ", sizes(x.q));
  const int64_t B = x.q.size(0), Lq = x.q.size(1), H = x.q.size(2), Dh = x.q.size(3), L = x.k.size(1), G = x.k.size(2);
  SISA_CHECK(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  SISA_CHECK(0 <= x.offset && x.offset + Lq <= L, "offset must be from 0 to ", L - Lq, ", got ", x.offset);
  check_tensor("q", x.q, {B, Lq, H, Dh}, dtype, x.q);
  check_tensor("k", x.k, {B, L, G, Dh}, dtype, x.q);
  check_tensor("v", x.v, {B, L, G, x.v.size(3)}, dtype, x.q);
  const bool importance = x.b.has_value();
  const bool together = x.c.has_value() == importance && x.theta.has_value() == importance && x.lam.has_value() == importance;
  SISA_CHECK(together && (!importance || x.log_decay), "b, c, log_decay, theta and lam must be given together");
  if (importance) {
    check_width("b", *x.b);
    const int64_t Ds = x.b->size(3);
    SISA_CHECK(Ds % 2 == 0, "b must have an even number of channels, got ", Ds);
    check_tensor("b", *x.b, {B, L, G, Ds}, dtype, x.q);
    check_tensor("c", *x.c, {B, Lq, H, Ds}, dtype, x.q);
    check_tensor("theta", *x.theta, {B, L, G, Ds / 2}, ScalarType::Float, x.q);
    check_tensor("lam", *x.lam, {H}, ScalarType::Float, x.q);
  }
  if (x.log_decay) check_tensor("log_decay", *x.log_decay, {B, L, importance ? G : H}, ScalarType::Float, x.q);
  check_tables(x.cos, x.sin, L, x.q);
  if (x.bounds) check_bounds(x, bounds);
}

// lam is contiguous; it and bounds must outlive the parameters.
void fill(
    AttentionParams& p, const Operands& x, const OptionalTensor& lam, const Integers& bounds, bool bf16_products, const Tensor& y,
    const Tensor& lse) {
  p.batch = x.q.size(0), p.queries = x.q.size(1), p.keys = x.k.size(1), p.offset = x.offset;
  p.heads = x.q.size(2), p.key_heads = x.k.size(2);
  p.head_width = x.q.size(3), p.value_width = x.v.size(3), p.state_width = x.b ? x.b->size(3) : 0;
  p.bias = x.bias();
  p.q = rows(x.q), p.k = rows(x.k), p.v = rows(x.v);
  if (x.b) p.b = rows(*x.b), p.c = rows(*x.c), p.theta = rows(*x.theta), p.lam = data<float>(*lam);
  if (x.log_decay) p.log_decay = rows(*x.log_decay);
  if (x.cos) p.cos = rows(*x.cos), p.sin = rows(*x.sin);
  if (x.bounds) p.bounds = bounds.data(), p.segments = static_cast<int64_t>(bounds.size()) - 1;
  p.bf16_products = bf16_products;
  p.y = rows(y), p.lse = data<float>(lse);
}

OptionalTensor in_one_piece(const OptionalTensor& x) {
  return x ? OptionalTensor(torch::stable::contiguous(*x)) : std::nullopt;
}

std::tuple<Tensor, Tensor> attention(
    Tensor q, Tensor k, Tensor v, OptionalTensor b, OptionalTensor c, OptionalTensor log_decay, OptionalTensor theta,
    OptionalTensor lam, OptionalTensor cos, OptionalTensor sin, OptionalTensor bounds, int64_t offset, bool bf16_products) {
  const Operands x{q, k, v, b, c, log_decay, theta, lam, cos, sin, bounds, offset};
  Integers documents;
  check(x, documents);
  const Tensor y = empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)}, ScalarType::Float);
  const Tensor lse = empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  const OptionalTensor lam_row = in_one_piece(lam);
  AttentionParams p{};
  fill(p, x, lam_row, documents, bf16_products, y, lse);
  cpu::kernels().attention(p);
  return {y, lse};
}

// The gradients of those of q, k, v, b, c, log_decay, theta and lam that are wanted, one after another.
std::vector<Tensor> attention_backward(
    Tensor dy, OptionalTensor dlse, Tensor y, Tensor lse, Tensor q, Tensor k, Tensor v, OptionalTensor b, OptionalTensor c,
    OptionalTensor log_decay, OptionalTensor theta, OptionalTensor lam, OptionalTensor cos, OptionalTensor sin,
    OptionalTensor bounds, int64_t offset, std::vector<bool> wanted, bool bf16_products) {
  const Operands x{q, k, v, b, c, log_decay, theta, lam, cos, sin, bounds, offset};
  Integers documents;
  check(x, documents);
  const int64_t B = q.size(0), Lq = q.size(1), H = q.size(2);
  check_tensor("dy", dy, {B, Lq, H, v.size(3)}, ScalarType::Float, q);
  check_tensor("y", y, {B, Lq, H, v.size(3)}, ScalarType::Float, q);
  check_tensor("lse", lse, {B, H, Lq}, ScalarType::Float, q);
  if (dlse) check_tensor("dlse", *dlse, {B, H, Lq}, ScalarType::Float, q);
  SISA_CHECK(lse.is_contiguous(), "lse must be contiguous");
  SISA_CHECK(wanted.size() == 8, "wanted must be 8 booleans, got ", wanted.size());
  const OptionalTensor lam_row = in_one_piece(lam), dlse_rows = in_one_piece(dlse);
  AttentionBackwardParams p{};
  fill(p, x, lam_row, documents, bf16_products, y, lse);
  p.dy = rows(dy), p.dlse = dlse_rows ? data<float>(*dlse_rows) : nullptr;
  std::vector<Tensor> grads;
  const auto grad = [&](size_t n, const OptionalTensor& of) -> const Tensor* {
    if (!wanted[n]) return nullptr;
    SISA_CHECK(of.has_value(), "wanted must not name an operand that is not given");
    grads.push_back(contiguous_like(*of));
    return &grads.back();
  };
  grads.reserve(8);  // the pointers stay
  Rows* const like_inputs[] = {&p.dq, &p.dk, &p.dv, &p.db, &p.dc};
  const OptionalTensor inputs[] = {q, k, v, b, c};
  for (size_t n = 0; n < 5; ++n) {
    if (const Tensor* out = grad(n, inputs[n])) *like_inputs[n] = rows(*out);
  }
  if (const Tensor* out = grad(5, log_decay)) p.dlog_decay = data<float>(*out);
  if (const Tensor* out = grad(6, theta)) p.dtheta = data<float>(*out);
  if (const Tensor* out = grad(7, lam)) p.dlam = data<float>(*out);
  cpu::kernels().attention_backward(p);
  return grads;
}

}  // namespace

}  // namespace sisa

STABLE_TORCH_LIBRARY_IMPL(sisa, CPU, m) {
  m.impl("attention", TORCH_BOX(&sisa::attention));
  m.impl("attention_backward", TORCH_BOX(&sisa::attention_backward));
}
