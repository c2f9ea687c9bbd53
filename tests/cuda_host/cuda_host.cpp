// The augmentation's CUDA kernels for the host, as test_augment_cuda.py calls them.
#include "cuda_shim.h"

#include "../../csrc/cuda/augment.cu"

namespace sisa::cuda {

alignas(16) double shared_memory[48 << 7];  // 48 KiB

namespace {

template <class Params, class Launch>
const char* run(const Params& params, int64_t size, bool last_block_first, Launch launch) {
  shim::shared = shared_memory, shim::shared_size = sizeof(shared_memory), shim::last_block_first = last_block_first;
  std::vector<double> workspace(size + 1, std::bit_cast<double>(~uint64_t{0}));
  const char* error = launch(params, workspace.data(), nullptr);
  const bool inside = std::bit_cast<uint64_t>(workspace.back()) == ~uint64_t{0};
  return inside ? error : "wrote past the workspace";
}

}  // namespace

}  // namespace sisa::cuda

extern "C" const char* host_augment(const sisa::AugmentParams* params, bool last_block_first) {
  return sisa::cuda::run(*params, sisa::cuda::augment_workspace(*params), last_block_first, sisa::cuda::augment);
}

extern "C" const char* host_augment_backward(const sisa::AugmentBackwardParams* params, bool last_block_first) {
  const int64_t size = sisa::cuda::augment_backward_workspace(*params);
  return sisa::cuda::run(*params, size, last_block_first, sisa::cuda::augment_backward);
}
