// sisa::augment and its backward (sisa_kernels/paths/augment.py).

#include <tuple>

#include "tensors.h"

#ifdef SISA_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/augment.h"
#endif

namespace sisa {

namespace {

struct Operands {
  const Tensor &q, &k, &b, &c, &log_decay, &theta, &lam;
  const OptionalTensor &cos, &sin;
  const Integers& starts;
  double clamp;
};

void check(const Operands& x) {
  check_floating("q", x.q.scalar_type());
  SISA_CHECK(x.q.dim() == 4 && x.q.numel() > 0, "q must be [batch, length, heads, channels], each >= 1, got ", sizes(x.q));
  SISA_CHECK(x.k.dim() == 4, "k must be [batch, length, key heads, channels], got ", sizes(x.k));
  SISA_CHECK(x.b.dim() == 4, "b must be [batch, length, key heads, Ds], got ", sizes(x.b));
  const int64_t B = x.q.size(0), L = x.q.size(1), H = x.q.size(2), Dh = x.q.size(3), G = x.k.size(2), Ds = x.b.size(3);
  SISA_CHECK(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  SISA_CHECK(Ds > 0 && Ds % 2 == 0, "b must have an even number of channels >= 2, got ", Ds);
  const auto dtype = x.q.scalar_type();
  check_tensor("q", x.q, {B, L, H, Dh}, dtype, x.q);
  check_tensor("k", x.k, {B, L, G, Dh}, dtype, x.q);
  check_tensor("b", x.b, {B, L, G, Ds}, dtype, x.q);
  check_tensor("c", x.c, {B, L, H, Ds}, dtype, x.q);
  check_tensor("log_decay", x.log_decay, {B, L, G}, ScalarType::Float, x.q);
  check_tensor("theta", x.theta, {B, L, G, Ds / 2}, ScalarType::Float, x.q);
  check_tensor("lam", x.lam, {H}, ScalarType::Float, x.q);
  check_tables(x.cos, x.sin, L, x.q);
  SISA_CHECK(x.clamp >= 0, "clamp must be >= 0, got ", x.clamp);
  SISA_CHECK(!x.starts.empty() && x.starts[0] == 0, "starts must begin with 0, got ", text(x.starts));
  for (size_t n = 1; n < x.starts.size(); ++n) {
    const bool rises = x.starts[n - 1] < x.starts[n] && x.starts[n] < L;
    SISA_CHECK(rises, "starts must rise and stay below ", L, ", got ", text(x.starts));
  }
#ifdef SISA_WITH_CUDA
  SISA_CHECK(!x.q.is_cuda() || Ds <= cuda::kMaxStateWidth, "b must have at most ", cuda::kMaxStateWidth, " channels, got ", Ds);
#endif
}

// lam is contiguous; it and starts must outlive the parameters.
void fill(AugmentParams& p, const Operands& x, const Tensor& lam, const Tensor& q_aug, const Tensor& k_aug) {
  p.batch = x.q.size(0), p.length = x.q.size(1), p.heads = x.q.size(2), p.key_heads = x.k.size(2);
  p.head_width = x.q.size(3), p.state_width = x.b.size(3), p.width = q_aug.size(3);
  p.q = rows(x.q), p.k = rows(x.k), p.b = rows(x.b), p.c = rows(x.c);
  p.log_decay = rows(x.log_decay), p.theta = rows(x.theta);
  if (x.cos) p.cos = rows(*x.cos), p.sin = rows(*x.sin);
  p.lam = data<float>(lam);
  p.starts = x.starts.data(), p.segments = static_cast<int64_t>(x.starts.size());
  p.clamp = x.clamp;
  p.q_aug = rows(q_aug), p.k_aug = rows(k_aug);
}

// ---- The kernels of q's device -------------------------------------------------------------------------------------------------

#ifdef SISA_WITH_CUDA
// The current stream of a device, from the torch that is loaded: libtorch_cuda is no dependency, as a torch for CPUs has none.
void* current_stream(int32_t device) {
  using Find = AOTITorchError (*)(int32_t, void**);
  static const auto find = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Find>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void* stream = nullptr;
  SISA_CHECK(find && find(device, &stream) == 0, "this torch does not tell its current CUDA stream");
  return stream;
}

template <class Params>
void run_cuda(const Params& p, const Tensor& q, int64_t workspace_size, const char* (*launch)(const Params&, double*, void*)) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Tensor workspace = empty(q, {workspace_size}, ScalarType::Double);
  const char* error = launch(p, data<double>(workspace), current_stream(q.get_device_index()));
  SISA_CHECK(!error, "CUDA: ", error);
}
#endif

void run(const AugmentParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef SISA_WITH_CUDA
  if (q.is_cuda()) return run_cuda(p, q, cuda::augment_workspace(p), cuda::augment);
#endif
  cpu::kernels().augment(p);
}

void run_backward(const AugmentBackwardParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef SISA_WITH_CUDA
  if (q.is_cuda()) return run_cuda(p, q, cuda::augment_backward_workspace(p), cuda::augment_backward);
#endif
  cpu::kernels().augment_backward(p);
}

// ---- Operators -----------------------------------------------------------------------------------------------------------------

using Augmented = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Augmented augment(
    Tensor q, Tensor k, Tensor b, Tensor c, Tensor log_decay, Tensor theta, Tensor lam, OptionalTensor cos, OptionalTensor sin,
    Integers starts, double clamp, int64_t width, ScalarType dtype) {
  const Operands x{q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp};
  check(x);
  check_floating("dtype", dtype);
  SISA_CHECK(width >= q.size(3) + b.size(3), "width must be at least Dh + Ds = ", q.size(3) + b.size(3), ", got ", width);
  const Tensor q_aug = empty(q, {q.size(0), q.size(1), q.size(2), width}, dtype);
  const Tensor k_aug = empty(k, {k.size(0), k.size(1), k.size(2), width}, dtype);
  const Tensor lam_row = torch::stable::contiguous(lam);
  AugmentParams p{};
  fill(p, x, lam_row, q_aug, k_aug);
  run(p, q);
  return {q_aug, k_aug};
}

Gradients augment_backward(
    Tensor dq_aug, Tensor dk_aug, Tensor q, Tensor k, Tensor b, Tensor c, Tensor log_decay, Tensor theta, Tensor lam,
    OptionalTensor cos, OptionalTensor sin, Integers starts, double clamp, OptionalTensor decay_flux, OptionalTensor phase_flux) {
  const Operands x{q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp};
  check(x);
  const auto dtype = dq_aug.scalar_type();
  check_floating("dq_aug", dtype);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), G = k.size(2), Ds = b.size(3);
  const int64_t segments = static_cast<int64_t>(starts.size()), used = q.size(3) + Ds;
  const bool wide = dq_aug.dim() == 4 && dq_aug.size(3) >= used;
  SISA_CHECK(wide, "dq_aug must have at least Dh + Ds = ", used, " channels, got ", sizes(dq_aug));
  check_tensor("dq_aug", dq_aug, {B, L, H, dq_aug.size(3)}, dtype, q);
  check_tensor("dk_aug", dk_aug, {B, L, G, dq_aug.size(3)}, dtype, q);
  if (decay_flux) check_tensor("decay_flux", *decay_flux, {B, segments, G}, ScalarType::Double, q);
  if (phase_flux) check_tensor("phase_flux", *phase_flux, {B, segments, G, Ds / 2}, ScalarType::Double, q);

  const Tensor dq = contiguous_like(q), dk = contiguous_like(k), db = contiguous_like(b), dc = contiguous_like(c);
  const Tensor dlog_decay = contiguous_like(log_decay), dtheta = contiguous_like(theta), dlam = contiguous_like(lam);
  const Tensor lam_row = torch::stable::contiguous(lam);
  if (decay_flux) decay_flux = torch::stable::contiguous(*decay_flux);
  if (phase_flux) phase_flux = torch::stable::contiguous(*phase_flux);
  AugmentBackwardParams p{};
  fill(p, x, lam_row, dq_aug, dk_aug);
  p.dq = rows(dq), p.dk = rows(dk), p.db = rows(db), p.dc = rows(dc);
  p.dlog_decay = data<float>(dlog_decay), p.dtheta = data<float>(dtheta);
  p.dlam = data<float>(dlam);
  p.decay_flux = decay_flux ? data<double>(*decay_flux) : nullptr;
  p.phase_flux = phase_flux ? data<double>(*phase_flux) : nullptr;
  run_backward(p, q);
  return {dq, dk, db, dc, dlog_decay, dtheta, dlam};
}

}  // namespace

}  // namespace sisa

STABLE_TORCH_LIBRARY_IMPL(sisa, CPU, m) {
  m.impl("augment", TORCH_BOX(&sisa::augment));
  m.impl("augment_backward", TORCH_BOX(&sisa::augment_backward));
}

#ifdef SISA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sisa, CUDA, m) {
  m.impl("augment", TORCH_BOX(&sisa::augment));
  m.impl("augment_backward", TORCH_BOX(&sisa::augment_backward));
}
#endif
