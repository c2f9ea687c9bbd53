// sisa::decode and sisa::decode_packed (sisa_kernels/step.py).

#include "../decode.h"
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

// What a step changes, but for phase and reach the buffers of a cache.
struct Held {
  const Tensor &k, &v;
  const OptionalTensor &b, &g, &phase, &reach;
  const Integers& lengths;
};

void check_cache(const char* name, const Tensor& x, std::initializer_list<int64_t> shape, ScalarType dtype, const Tensor& q) {
  check_tensor(name, x, shape, dtype, q);
  const auto strides = x.strides();
  SISA_CHECK(strides.back() == 1, name, "'s last axis must have stride 1, got ", text(strides.data(), strides.size()));
}

// Fills what p has of the caches, whose sizes but the key heads' number it has.
void take_cache(DecodeParams& p, const Held& x, const Tensor& q) {
  SISA_CHECK(x.k.dim() == 4, "k_cache must be [batch, key heads, capacity, channels], got ", sizes(x.k));
  const int64_t B = p.batch, G = p.key_heads, Ds = p.state_width, capacity = x.k.size(2);
  const auto dtype = q.scalar_type();
  check_cache("k_cache", x.k, {B, G, capacity, p.head_width}, dtype, q);
  check_cache("v_cache", x.v, {B, G, capacity, p.value_width}, dtype, q);
  const bool importance = p.bias == Bias::importance;
  SISA_CHECK(
      x.b.has_value() == importance && x.phase.has_value() == importance && x.reach.has_value() == importance,
      "b_cache, phase and reach must be given with b, and only then");
  SISA_CHECK(x.g.has_value() == (p.bias != Bias::none), "g_cache must be given with log_decay, and only then");
  p.k_cache = slots(x.k), p.v_cache = slots(x.v);
  if (x.g) {
    check_cache("g_cache", *x.g, {B, importance ? G : p.heads, capacity}, ScalarType::Double, q);
    p.g_cache = data<double>(*x.g), p.g_batch = x.g->stride(0), p.g_head = x.g->stride(1);
  }
  if (importance) {
    check_cache("b_cache", *x.b, {B, G, capacity, Ds}, dtype, q);
    check_tensor("phase", *x.phase, {B, G, Ds / 2}, ScalarType::Double, q);
    check_tensor("reach", *x.reach, {B, G}, ScalarType::Double, q);
    SISA_CHECK(x.phase->is_contiguous() && x.reach->is_contiguous(), "phase and reach must be contiguous");
    p.b_cache = slots(*x.b), p.phase = data<double>(*x.phase), p.reach = data<double>(*x.reach);
  }
  const bool fits = std::all_of(x.lengths.begin(), x.lengths.end(), [&](int64_t n) { return 1 <= n && n < capacity; });
  SISA_CHECK(
      static_cast<int64_t>(x.lengths.size()) == B && fits, "lengths must be ", B, " integers from 1 to the capacity ", capacity,
      " less 1, got ", text(x.lengths));
  p.lengths = x.lengths.data();
}

void take_tables(DecodeParams& p, const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& q) {
  SISA_CHECK(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (!cos) return;
  const int64_t width = p.head_width;
  SISA_CHECK(width % 2 == 0, "cos and sin need an even head width, got q with ", width, " channels");
  const auto table_rows = [&](const Tensor& table) { return table.dim() > 0 && table.size(0) == 1 ? 1 : p.batch; };
  check_tensor("cos", *cos, {table_rows(*cos), 1, width / 2}, ScalarType::Float, q);
  check_tensor("sin", *sin, {table_rows(*sin), 1, width / 2}, ScalarType::Float, q);
  p.cos = token_table(*cos), p.sin = token_table(*sin);
}

Tensor run(DecodeParams& p, const Tensor& q) {
  const Tensor y = empty(q, {p.batch, 1, p.heads, p.value_width}, q.scalar_type());
  p.y = rows(y);
  cpu::kernels().decode(p);
  return y;
}

Tensor decode(
    Tensor q, Tensor k, Tensor v, OptionalTensor b, OptionalTensor c, OptionalTensor log_decay, OptionalTensor theta,
    OptionalTensor lam, OptionalTensor cos, OptionalTensor sin, Tensor k_cache, Tensor v_cache, OptionalTensor b_cache,
    OptionalTensor g_cache, OptionalTensor phase, OptionalTensor reach, Integers lengths) {
  check_floating("q", q.scalar_type());
  const bool one_token = q.dim() == 4 && q.numel() > 0 && q.size(1) == 1;
  SISA_CHECK(one_token, "q must be [batch, 1, heads, channels], each >= 1, got ", sizes(q));
  SISA_CHECK(k.dim() == 4, "k must be [batch, 1, key heads, channels], got ", sizes(k));
  SISA_CHECK(v.dim() == 4 && v.size(3) > 0, "v must be [batch, 1, key heads, Dv] with Dv >= 1, got ", sizes(v));
  const int64_t B = q.size(0), H = q.size(2), Dh = q.size(3), G = k.size(2), Dv = v.size(3);
  SISA_CHECK(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  const auto dtype = q.scalar_type();
  check_tensor("q", q, {B, 1, H, Dh}, dtype, q);
  check_tensor("k", k, {B, 1, G, Dh}, dtype, q);
  check_tensor("v", v, {B, 1, G, Dv}, dtype, q);
  const bool importance = b.has_value();
  const bool together = c.has_value() == importance && theta.has_value() == importance && lam.has_value() == importance;
  SISA_CHECK(together && (!importance || log_decay), "b, c, log_decay, theta and lam must be given together");
  DecodeParams p{};
  p.bias = importance ? Bias::importance : log_decay ? Bias::forget : Bias::none;
  p.batch = B, p.heads = H, p.key_heads = G, p.head_width = Dh, p.value_width = Dv;
  p.q = rows(q), p.k = rows(k), p.v = rows(v);
  if (log_decay) {
    check_tensor("log_decay", *log_decay, {B, 1, importance ? G : H}, ScalarType::Float, q);
    p.log_decay = rows(*log_decay);
  }
  OptionalTensor lam_row;
  if (importance) {
    SISA_CHECK(b->dim() == 4, "b must be [batch, 1, key heads, Ds], got ", sizes(*b));
    const int64_t Ds = b->size(3);
    SISA_CHECK(Ds > 0 && Ds % 2 == 0, "b must have an even number of channels >= 2, got ", Ds);
    check_tensor("b", *b, {B, 1, G, Ds}, dtype, q);
    check_tensor("c", *c, {B, 1, H, Ds}, dtype, q);
    check_tensor("theta", *theta, {B, 1, G, Ds / 2}, ScalarType::Float, q);
    check_tensor("lam", *lam, {H}, ScalarType::Float, q);
    lam_row = torch::stable::contiguous(*lam);
    p.state_width = Ds, p.b = rows(*b), p.c = rows(*c), p.theta = rows(*theta), p.lam = data<float>(*lam_row);
  }
  take_tables(p, cos, sin, q);
  take_cache(p, {k_cache, v_cache, b_cache, g_cache, phase, reach, lengths}, q);
  return run(p, q);
}

// The channels of x [B, 1, width] from `at` on, as those of heads of `width` each; at is moved past them.
Rows part(const Tensor& x, int64_t& at, int64_t heads, int64_t width) {
  Rows r;
  r.dtype = kernel_dtype(x.scalar_type());
  r.data = static_cast<char*>(x.data_ptr()) + at * x.element_size();
  r.batch = x.stride(0), r.head = width, r.channel = 1;
  at += heads * width;
  return r;
}

Tensor decode_packed(
    Tensor packed, Tensor decay_bias, Tensor raw_lam, OptionalTensor cos, OptionalTensor sin, Tensor k_cache, Tensor v_cache,
    Tensor b_cache, Tensor g_cache, Tensor phase, Tensor reach, Integers lengths) {
  check_floating("packed", packed.scalar_type());
  SISA_CHECK(packed.dim() == 3 && packed.numel() > 0, "packed must be [batch, 1, width], each >= 1, got ", sizes(packed));
  for (const Tensor* x : {&k_cache, &v_cache, &b_cache}) {
    SISA_CHECK(x->dim() == 4 && x->numel() > 0, "caches must be [batch, key heads, capacity, channels], got ", sizes(*x));
  }
  DecodeParams p{};
  const int64_t G = k_cache.size(1), Dh = k_cache.size(3), Dv = v_cache.size(3), Ds = b_cache.size(3), width = packed.size(2);
  const int64_t of_keys = G * (Dh + Dv + Ds + 1 + Ds / 2), H = (width - of_keys) / (Dh + Ds);
  SISA_CHECK(
      Ds % 2 == 0 && H > 0 && H % G == 0 && width == of_keys + H * (Dh + Ds),
      "packed must have the channels of q, k, v, b, c, decay and phase, of some number of heads and the cache's ", G,
      " key heads, got ", width);
  const int64_t B = packed.size(0);
  check_tensor("packed", packed, {B, 1, width}, packed.scalar_type(), packed);
  SISA_CHECK(packed.stride(2) == 1, "packed's last axis must have stride 1, got ", packed.stride(2));
  check_tensor("decay_bias", decay_bias, {G}, ScalarType::Float, packed);
  check_tensor("raw_lam", raw_lam, {H}, ScalarType::Float, packed);
  p.bias = Bias::importance;
  p.batch = B, p.heads = H, p.key_heads = G, p.head_width = Dh, p.value_width = Dv, p.state_width = Ds;
  int64_t at = 0;
  p.q = part(packed, at, H, Dh), p.k = part(packed, at, G, Dh), p.v = part(packed, at, G, Dv);
  p.b = part(packed, at, G, Ds), p.c = part(packed, at, H, Ds);
  p.log_decay = part(packed, at, G, 1), p.theta = part(packed, at, G, Ds / 2);
  const Tensor bias_row = torch::stable::contiguous(decay_bias), lam_row = torch::stable::contiguous(raw_lam);
  p.decay_bias = data<float>(bias_row), p.lam = data<float>(lam_row);
  take_tables(p, cos, sin, packed);
  const OptionalTensor b(b_cache), g(g_cache), phases(phase), reached(reach);
  take_cache(p, {k_cache, v_cache, b, g, phases, reached, lengths}, packed);
  return run(p, packed);
}

}  // namespace

}  // namespace sisa

STABLE_TORCH_LIBRARY_IMPL(sisa, CPU, m) {
  m.impl("decode", TORCH_BOX(&sisa::decode));
  m.impl("decode_packed", TORCH_BOX(&sisa::decode_packed));
}
