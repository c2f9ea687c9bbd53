// The operators' schemas, argument checks and dispatch, and the Python module sisa_kernels._C.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <utility>

#include "sisa.h"

#ifdef SISA_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/augment.h"
#endif

namespace {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---- Argument checks: every message names the argument ------------------------------------------------------------------------

void check_tensor(const char* name, const Tensor& x, IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  TORCH_CHECK_VALUE(x.device() == device, name, " must be on ", device, " like q, got ", x.device());
  TORCH_CHECK_VALUE(x.layout() == at::kStrided, name, " must be a dense tensor, got layout ", x.layout());
  TORCH_CHECK_VALUE(x.sizes() == shape, name, " must have shape ", shape, ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == dtype, name, " must be ", dtype, ", got ", x.scalar_type());
}

bool is_kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}

void check_floating(const char* name, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(
      is_kernel_dtype(dtype) || dtype == at::kDouble, name, " must be Float, BFloat16, Half or Double, got ", dtype);
}

struct Operands {
  const Tensor &q, &k, &b, &c, &log_decay, &theta, &lam;
  const OptionalTensor &cos, &sin;
  IntArrayRef starts;
  double clamp;
};

// fp64, and states too wide for the CUDA kernels: what the implementation in Python is given is checked there.
bool left_to_python(const Operands& x, at::ScalarType augmented) {
  check_floating("q", x.q.scalar_type());
#ifdef SISA_WITH_CUDA
  if (x.q.is_cuda() && x.b.dim() == 4 && x.b.size(3) > sisa::cuda::kMaxStateWidth) return true;
#endif
  return x.q.scalar_type() == at::kDouble || augmented == at::kDouble;
}

void check(const Operands& x) {
  TORCH_CHECK_VALUE(x.q.dim() == 4 && x.q.numel() > 0, "q must be [batch, length, heads, channels], each >= 1, got ", x.q.sizes());
  TORCH_CHECK_VALUE(x.k.dim() == 4, "k must be [batch, length, key heads, channels], got ", x.k.sizes());
  TORCH_CHECK_VALUE(x.b.dim() == 4, "b must be [batch, length, key heads, Ds], got ", x.b.sizes());
  const int64_t B = x.q.size(0), L = x.q.size(1), H = x.q.size(2), Dh = x.q.size(3), G = x.k.size(2), Ds = x.b.size(3);
  TORCH_CHECK_VALUE(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  TORCH_CHECK_VALUE(Ds > 0 && Ds % 2 == 0, "b must have an even number of channels >= 2, got ", Ds);
  const auto dtype = x.q.scalar_type();
  const auto device = x.q.device();
  check_tensor("q", x.q, {B, L, H, Dh}, dtype, device);
  check_tensor("k", x.k, {B, L, G, Dh}, dtype, device);
  check_tensor("b", x.b, {B, L, G, Ds}, dtype, device);
  check_tensor("c", x.c, {B, L, H, Ds}, dtype, device);
  check_tensor("log_decay", x.log_decay, {B, L, G}, at::kFloat, device);
  check_tensor("theta", x.theta, {B, L, G, Ds / 2}, at::kFloat, device);
  check_tensor("lam", x.lam, {H}, at::kFloat, device);
  TORCH_CHECK_VALUE(x.cos.has_value() == x.sin.has_value(), "cos and sin must be given together");
  if (x.cos) {
    TORCH_CHECK_VALUE(Dh % 2 == 0, "cos and sin need an even head width, got q with ", Dh, " channels");
    check_tensor("cos", *x.cos, {L, Dh / 2}, at::kFloat, device);
    check_tensor("sin", *x.sin, {L, Dh / 2}, at::kFloat, device);
  }
  TORCH_CHECK_VALUE(x.clamp >= 0, "clamp must be >= 0, got ", x.clamp);
  TORCH_CHECK_VALUE(!x.starts.empty() && x.starts[0] == 0, "starts must begin with 0, got ", x.starts);
  for (size_t n = 1; n < x.starts.size(); ++n) {
    TORCH_CHECK_VALUE(x.starts[n - 1] < x.starts[n] && x.starts[n] < L, "starts must rise and stay below ", L, ", got ", x.starts);
  }
}

// ---- Parameters ---------------------------------------------------------------------------------------------------------------

sisa::DType kernel_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat ? sisa::DType::float32 : dtype == at::kBFloat16 ? sisa::DType::bfloat16 : sisa::DType::float16;
}

// [B, L, heads, channels], [B, L, heads] or a table [L, channels].
sisa::Rows rows(const Tensor& x) {
  sisa::Rows r;
  r.data = x.data_ptr();
  r.dtype = kernel_dtype(x.scalar_type());
  const bool table = x.dim() == 2;
  r.batch = table ? 0 : x.stride(0);
  r.token = x.stride(table ? 0 : 1);
  r.head = table ? 0 : x.stride(2);
  r.channel = x.dim() == 3 ? 1 : x.stride(-1);
  return r;
}

// lam is contiguous; it and starts must outlive the parameters.
void fill(sisa::AugmentParams& p, const Operands& x, const Tensor& lam, const Tensor& q_aug, const Tensor& k_aug) {
  p.batch = x.q.size(0), p.length = x.q.size(1), p.heads = x.q.size(2), p.key_heads = x.k.size(2);
  p.head_width = x.q.size(3), p.state_width = x.b.size(3), p.width = q_aug.size(3);
  p.q = rows(x.q), p.k = rows(x.k), p.b = rows(x.b), p.c = rows(x.c);
  p.log_decay = rows(x.log_decay), p.theta = rows(x.theta);
  if (x.cos) p.cos = rows(*x.cos), p.sin = rows(*x.sin);
  p.lam = lam.const_data_ptr<float>();
  p.starts = x.starts.data(), p.segments = static_cast<int64_t>(x.starts.size());
  p.clamp = x.clamp;
  p.q_aug = rows(q_aug), p.k_aug = rows(k_aug);
}

template <class Function, class... Args>
auto in_python(const char* name, Args&&... args) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>().call(std::forward<Args>(args)...);
}

// ---- The kernels of q's device ------------------------------------------------------------------------------------------------

void run(const sisa::AugmentParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef SISA_WITH_CUDA
  if (q.is_cuda()) {
    const c10::cuda::CUDAGuard guard(q.device());
    const Tensor workspace = at::empty({sisa::cuda::augment_workspace(p)}, q.options().dtype(at::kDouble));
    C10_CUDA_CHECK(sisa::cuda::augment(p, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
    return;
  }
#endif
  sisa::cpu::augment(p);
}

void run_backward(const sisa::AugmentBackwardParams& p, [[maybe_unused]] const Tensor& q) {
#ifdef SISA_WITH_CUDA
  if (q.is_cuda()) {
    const c10::cuda::CUDAGuard guard(q.device());
    const Tensor workspace = at::empty({sisa::cuda::augment_backward_workspace(p)}, q.options().dtype(at::kDouble));
    C10_CUDA_CHECK(sisa::cuda::augment_backward(p, workspace.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
    return;
  }
#endif
  sisa::cpu::augment_backward(p);
}

// ---- Operators ----------------------------------------------------------------------------------------------------------------

using Augmented = std::tuple<Tensor, Tensor>;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Augmented augment(
    const Tensor& q, const Tensor& k, const Tensor& b, const Tensor& c, const Tensor& log_decay, const Tensor& theta,
    const Tensor& lam, const OptionalTensor& cos, const OptionalTensor& sin, IntArrayRef starts, double clamp, int64_t width,
    at::ScalarType dtype) {
  const Operands x{q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp};
  check_floating("dtype", dtype);
  if (left_to_python(x, dtype)) {
    return in_python<decltype(augment)>(
        "sisa::augment_eager", q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, width, dtype);
  }
  check(x);
  TORCH_CHECK_VALUE(width >= q.size(3) + b.size(3), "width must be at least Dh + Ds = ", q.size(3) + b.size(3), ", got ", width);
  const Tensor q_aug = at::empty({q.size(0), q.size(1), q.size(2), width}, q.options().dtype(dtype));
  const Tensor k_aug = at::empty({k.size(0), k.size(1), k.size(2), width}, q.options().dtype(dtype));
  const Tensor lam_row = lam.contiguous();
  sisa::AugmentParams p{};
  fill(p, x, lam_row, q_aug, k_aug);
  run(p, q);
  return {q_aug, k_aug};
}

Gradients augment_backward(
    const Tensor& dq_aug, const Tensor& dk_aug, const Tensor& q, const Tensor& k, const Tensor& b, const Tensor& c,
    const Tensor& log_decay, const Tensor& theta, const Tensor& lam, const OptionalTensor& cos, const OptionalTensor& sin,
    IntArrayRef starts, double clamp, const OptionalTensor& decay_flux, const OptionalTensor& phase_flux) {
  const Operands x{q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp};
  const auto dtype = dq_aug.scalar_type();
  check_floating("dq_aug", dtype);
  if (left_to_python(x, dtype)) {
    return in_python<decltype(augment_backward)>(
        "sisa::augment_backward_eager", dq_aug, dk_aug, q, k, b, c, log_decay, theta, lam, cos, sin, starts, clamp, decay_flux,
        phase_flux);
  }
  check(x);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), G = k.size(2), Ds = b.size(3);
  const int64_t segments = static_cast<int64_t>(starts.size()), used = q.size(3) + Ds;
  TORCH_CHECK_VALUE(
      dq_aug.dim() == 4 && dq_aug.size(3) >= used, "dq_aug must have at least Dh + Ds = ", used, " channels, got ", dq_aug.sizes());
  check_tensor("dq_aug", dq_aug, {B, L, H, dq_aug.size(3)}, dtype, q.device());
  check_tensor("dk_aug", dk_aug, {B, L, G, dq_aug.size(3)}, dtype, q.device());
  if (decay_flux) check_tensor("decay_flux", *decay_flux, {B, segments, G}, at::kDouble, q.device());
  if (phase_flux) check_tensor("phase_flux", *phase_flux, {B, segments, G, Ds / 2}, at::kDouble, q.device());

  const auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  const Tensor dq = like(q), dk = like(k), db = like(b), dc = like(c), dlog_decay = like(log_decay), dtheta = like(theta);
  const Tensor dlam = like(lam), lam_row = lam.contiguous();
  const Tensor decay = decay_flux ? decay_flux->contiguous() : Tensor(), phase = phase_flux ? phase_flux->contiguous() : Tensor();
  sisa::AugmentBackwardParams p{};
  fill(p, x, lam_row, dq_aug, dk_aug);
  p.dq = rows(dq), p.dk = rows(dk), p.db = rows(db), p.dc = rows(dc);
  p.dlog_decay = dlog_decay.mutable_data_ptr<float>(), p.dtheta = dtheta.mutable_data_ptr<float>();
  p.dlam = dlam.mutable_data_ptr<float>();
  p.decay_flux = decay_flux ? decay.const_data_ptr<double>() : nullptr;
  p.phase_flux = phase_flux ? phase.const_data_ptr<double>() : nullptr;
  run_backward(p, q);
  return {dq, dk, db, dc, dlog_decay, dtheta, dlam};
}

Tensor decode(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& b, const Tensor& c, const Tensor& log_decay,
    const Tensor& theta, const Tensor& lam, const OptionalTensor& cos, const OptionalTensor& sin, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& b_cache, const Tensor& g_cache, const Tensor& phase, IntArrayRef lengths) {
  check_floating("q", q.scalar_type());
  if (q.scalar_type() == at::kDouble) {
    return in_python<decltype(decode)>(
        "sisa::decode_eager", q, k, v, b, c, log_decay, theta, lam, cos, sin, k_cache, v_cache, b_cache, g_cache, phase, lengths);
  }
  TORCH_CHECK_VALUE(
      q.dim() == 4 && q.numel() > 0 && q.size(1) == 1, "q must be [batch, 1, heads, channels], each >= 1, got ", q.sizes());
  TORCH_CHECK_VALUE(k.dim() == 4, "k must be [batch, 1, key heads, channels], got ", k.sizes());
  TORCH_CHECK_VALUE(v.dim() == 4 && v.size(3) > 0, "v must be [batch, 1, key heads, Dv] with Dv >= 1, got ", v.sizes());
  TORCH_CHECK_VALUE(b.dim() == 4, "b must be [batch, 1, key heads, Ds], got ", b.sizes());
  TORCH_CHECK_VALUE(k_cache.dim() == 4, "k_cache must be [batch, key heads, capacity, channels], got ", k_cache.sizes());
  const int64_t B = q.size(0), H = q.size(2), Dh = q.size(3), G = k.size(2), Dv = v.size(3), Ds = b.size(3);
  const int64_t capacity = k_cache.size(2);
  TORCH_CHECK_VALUE(G > 0 && H % G == 0, "the heads of k must divide those of q, got ", G, " and ", H);
  TORCH_CHECK_VALUE(Ds > 0 && Ds % 2 == 0, "b must have an even number of channels >= 2, got ", Ds);
  const auto dtype = q.scalar_type();
  const auto device = q.device();
  check_tensor("q", q, {B, 1, H, Dh}, dtype, device);
  check_tensor("k", k, {B, 1, G, Dh}, dtype, device);
  check_tensor("v", v, {B, 1, G, Dv}, dtype, device);
  check_tensor("b", b, {B, 1, G, Ds}, dtype, device);
  check_tensor("c", c, {B, 1, H, Ds}, dtype, device);
  check_tensor("log_decay", log_decay, {B, 1, G}, at::kFloat, device);
  check_tensor("theta", theta, {B, 1, G, Ds / 2}, at::kFloat, device);
  check_tensor("lam", lam, {H}, at::kFloat, device);
  check_tensor("k_cache", k_cache, {B, G, capacity, Dh}, dtype, device);
  check_tensor("v_cache", v_cache, {B, G, capacity, Dv}, dtype, device);
  check_tensor("b_cache", b_cache, {B, G, capacity, Ds}, dtype, device);
  check_tensor("g_cache", g_cache, {B, G, capacity}, at::kDouble, device);
  check_tensor("phase", phase, {B, G, Ds / 2}, at::kDouble, device);
  for (const Tensor* x : {&k_cache, &v_cache, &b_cache, &g_cache}) {
    TORCH_CHECK_VALUE(x->stride(-1) == 1, "the caches' last axis must have stride 1, got strides ", x->strides());
  }
  TORCH_CHECK_VALUE(phase.is_contiguous(), "phase must be contiguous, got strides ", phase.strides());
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), "cos and sin must be given together");
  if (cos) {
    TORCH_CHECK_VALUE(Dh % 2 == 0, "cos and sin need an even head width, got q with ", Dh, " channels");
    for (const auto& [name, table] : {std::pair("cos", *cos), std::pair("sin", *sin)}) {
      check_tensor(name, table, {table.dim() > 0 && table.size(0) == 1 ? 1 : B, 1, Dh / 2}, at::kFloat, device);
    }
  }
  const bool fits = std::all_of(lengths.begin(), lengths.end(), [&](int64_t n) { return 1 <= n && n < capacity; });
  TORCH_CHECK_VALUE(
      static_cast<int64_t>(lengths.size()) == B && fits, "lengths must be ", B, " integers from 1 to the capacity ", capacity,
      " less 1, got ", lengths);

  const Tensor y = at::empty({B, 1, H, Dv}, q.options()), lam_row = lam.contiguous();
  const auto slots = [](const Tensor& cache) { return rows(cache.transpose(1, 2)); };
  sisa::DecodeParams p{};
  p.batch = B, p.heads = H, p.key_heads = G, p.head_width = Dh, p.state_width = Ds, p.value_width = Dv;
  p.q = rows(q), p.k = rows(k), p.v = rows(v), p.b = rows(b), p.c = rows(c), p.log_decay = rows(log_decay), p.theta = rows(theta);
  if (cos) p.cos = rows(cos->expand({B, 1, Dh / 2}).unsqueeze(2)), p.sin = rows(sin->expand({B, 1, Dh / 2}).unsqueeze(2));
  p.k_cache = slots(k_cache), p.v_cache = slots(v_cache), p.b_cache = slots(b_cache);
  p.g_cache = g_cache.mutable_data_ptr<double>(), p.g_batch = g_cache.stride(0), p.g_head = g_cache.stride(1);
  p.phase = phase.mutable_data_ptr<double>();
  p.lam = lam_row.const_data_ptr<float>(), p.lengths = lengths.data();
  p.y = rows(y);
  sisa::cpu::decode(p);
  return y;
}

}  // namespace

TORCH_LIBRARY(sisa, m) {
  m.def(
      "augment(Tensor q, Tensor k, Tensor b, Tensor c, Tensor log_decay, Tensor theta, Tensor lam, Tensor? cos, Tensor? sin, "
      "SymInt[] starts, float clamp, SymInt width, ScalarType dtype) -> (Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "augment_backward(Tensor dq_aug, Tensor dk_aug, Tensor q, Tensor k, Tensor b, Tensor c, Tensor log_decay, Tensor theta, "
      "Tensor lam, Tensor? cos, Tensor? sin, SymInt[] starts, float clamp, Tensor? decay_flux, Tensor? phase_flux) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "decode(Tensor q, Tensor k, Tensor v, Tensor b, Tensor c, Tensor log_decay, Tensor theta, Tensor lam, Tensor? cos, "
      "Tensor? sin, Tensor(a10!) k_cache, Tensor(a11!) v_cache, Tensor(a12!) b_cache, Tensor(a13!) g_cache, Tensor(a14!) phase, "
      "SymInt[] lengths) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(sisa, CPU, m) {
  m.impl("augment", &augment);
  m.impl("augment_backward", &augment_backward);
  m.impl("decode", &decode);
}

#ifdef SISA_WITH_CUDA
TORCH_LIBRARY_IMPL(sisa, CUDA, m) {
  m.impl("augment", &augment);
  m.impl("augment_backward", &augment_backward);
}
#endif

// ---- The build ----------------------------------------------------------------------------------------------------------------

#define SISA_STRING_(x) #x
#define SISA_STRING(x) SISA_STRING_(x)
#ifdef _OPENMP
#define SISA_OPENMP SISA_STRING(_OPENMP)
#else
#define SISA_OPENMP "off"
#endif

// _extension.py reads this record from the file before loading it: code for another torch or another CPU must not be run.
#define SISA_FIELD(name, value) "\n" name "=" value
extern const char sisa_build_record[];
const char sisa_build_record[] = "sisa build record" SISA_FIELD("torch", SISA_TORCH) SISA_FIELD("vector", SISA_VECTOR)
    SISA_FIELD("compiler", "g++ " __VERSION__) SISA_FIELD("flags", SISA_FLAGS) SISA_FIELD("openmp", SISA_OPENMP)
        SISA_FIELD("cuda_archs", SISA_CUDA_ARCHS) "\n";

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of sisa_kernels; loading it registers the operators.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        std::istringstream record(sisa_build_record);
        std::string line;
        std::getline(record, line);
        while (std::getline(record, line)) info[line.substr(0, line.find('=')).c_str()] = line.substr(line.find('=') + 1);
        return info;
      },
      "What this was built for and with: torch, vector width, compiler, flags, OpenMP, CUDA architectures.");
}
