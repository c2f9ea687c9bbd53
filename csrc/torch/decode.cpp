// sisa::decode (sisa_kernels/decode.py).

#include "tensors.h"

namespace sisa {

namespace {

// A cache [B, heads, capacity(, channels)] as [B, capacity, heads, channels].
Rows slots(const Tensor& cache) {
  Rows r = rows(cache);
  std::swap(r.token, r.head);
  return r;
}

// RoPE's table [B or 1, 1, Dh / 2] of one new token a row.
Rows token_table(const Tensor& table) {
  Rows r = rows(table);
  r.batch = table.size(0) == 1 ? 0 : table.stride(0);
  r.channel = table.stride(2);
  return r;
}

Tensor decode(
    Tensor q, Tensor k, Tensor v, Tensor b, Tensor c, Tensor log_decay, Tensor theta, Tensor lam, OptionalTensor cos,
    OptionalTensor sin, Tensor k_cache, Tensor v_cache, Tensor b_cache, Tensor g_cache, Tensor phase, Integers lengths) {
  check_floating("q", q.scalar_type());
  const bool one_token = q.dim() == 4 && q.numel() > 0 && q.size(1) == 1;
  SISA_CHECK(one_token, "q must be [batch, 1, heads, channels], each >= 1, got ", sizes(q));
  SISA_CHECK(k.dim() == 4, "k must be [batch, 1, key heads, channels], got ", sizes(k));
  SISA_CHECK(v.dim() == 4 && v.size(3) > 0, "v must be [batch, 1, key heads, Dv] with Dv >= 1, got ", sizes(v));
  SISA_CHECK(b.dim() == 4, "b must be [batch, 1, key heads, Ds], got ", sizes(b));
  SISA_CHECK(k_cache.dim() == 4, "k_cache must be [batch, key heads, capacity, channels], got ", sizes(k_cache));
  const int64_t B = q.size(0), H = q.size(2), Dh = q.size(3), G = k.size(2), Dv = v.size(3), Ds = b.size(3);
  const int64_t capacity = k_cache.size(2);
  SISA_CHECK(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  SISA_CHECK(Ds > 0 && Ds % 2 == 0, "b must have an even number of channels >= 2, got ", Ds);
  const auto dtype = q.scalar_type();
  check_tensor("q", q, {B, 1, H, Dh}, dtype, q);
  check_tensor("k", k, {B, 1, G, Dh}, dtype, q);
  check_tensor("v", v, {B, 1, G, Dv}, dtype, q);
  check_tensor("b", b, {B, 1, G, Ds}, dtype, q);
  check_tensor("c", c, {B, 1, H, Ds}, dtype, q);
  check_tensor("log_decay", log_decay, {B, 1, G}, ScalarType::Float, q);
  check_tensor("theta", theta, {B, 1, G, Ds / 2}, ScalarType::Float, q);
  check_tensor("lam", lam, {H}, ScalarType::Float, q);
  check_tensor("k_cache", k_cache, {B, G, capacity, Dh}, dtype, q);
  check_tensor("v_cache", v_cache, {B, G, capacity, Dv}, dtype, q);
  check_tensor("b_cache", b_cache, {B, G, capacity, Ds}, dtype, q);
  check_tensor("g_cache", g_cache, {B, G, capacity}, ScalarType::Double, q);
  check_tensor("phase", phase, {B, G, Ds / 2}, ScalarType::Double, q);
  for (const Tensor* x : {&k_cache, &v_cache, &b_cache, &g_cache}) {
    const auto strides = x->strides();
    SISA_CHECK(strides.back() == 1, "the caches' last axis must have stride 1, got ", text(strides.data(), strides.size()));
  }
  SISA_CHECK(phase.is_contiguous(), "phase must be contiguous");
  SISA_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (cos) {
    SISA_CHECK(Dh % 2 == 0, "cos and sin need an even head width, got q with ", Dh, " channels");
    const auto table_rows = [&](const Tensor& table) { return table.dim() > 0 && table.size(0) == 1 ? 1 : B; };
    check_tensor("cos", *cos, {table_rows(*cos), 1, Dh / 2}, ScalarType::Float, q);
    check_tensor("sin", *sin, {table_rows(*sin), 1, Dh / 2}, ScalarType::Float, q);
  }
  const bool fits = std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return 1 <= n && n < capacity; });
  SISA_CHECK(
      static_cast<int64_t>(lengths.size()) == B && fits, "lengths must be ", B, " integers from 1 to the capacity ", capacity,
      " less 1, got ", text(lengths));

  const Tensor y = empty(q, {B, 1, H, Dv}, dtype), lam_row = torch::stable::contiguous(lam);
  DecodeParams p{};
  p.batch = B, p.heads = H, p.key_heads = G, p.head_width = Dh, p.state_width = Ds, p.value_width = Dv;
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.b = rows(b), p.c = rows(c), p.log_decay = rows(log_decay), p.theta = rows(theta);
  if (cos) p.cos = token_table(*cos), p.sin = token_table(*sin);
  p.k_cache = slots(k_cache), p.v_cache = slots(v_cache), p.b_cache = slots(b_cache);
  p.g_cache = data<double>(g_cache), p.g_batch = g_cache.stride(0), p.g_head = g_cache.stride(1);
  p.phase = data<double>(phase);
  p.lam = data<float>(lam_row), p.lengths = lengths.data();
  p.y = rows(y);
  cpu::kernels().decode(p);
  return y;
}

}  // namespace

}  // namespace sisa

STABLE_TORCH_LIBRARY_IMPL(sisa, CPU, m) {
  m.impl("decode", TORCH_BOX(&sisa::decode));
}
