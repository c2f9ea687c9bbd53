// A CUDA device that does nothing, for a PyTorch without CUDA: what autograd asks of a device, so
// that tensors without values (FakeTensorMode) may be on one, forward and backward. To be preloaded:
// it goes before PyTorch's own answer to which accelerator there is.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

c10::Stream only_stream() {
  return c10::Stream(c10::Stream::DEFAULT, {CUDA, 0});
}

struct Guard : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device getDevice() const override { return {CUDA, 0}; }
  c10::Stream getStream(c10::Device) const noexcept override { return only_stream(); }
};

// Registered under its own name, which PyTorch looks for.
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

namespace at::accelerator {

__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return CUDA;
}

__attribute__((visibility("default"))) c10::Stream getCurrentStream(c10::DeviceIndex) {
  return only_stream();
}

}  // namespace at::accelerator
