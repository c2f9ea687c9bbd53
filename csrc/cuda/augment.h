// The launchers of the augmentation's CUDA kernels. They allocate nothing and never wait for the device: the caller gives a
// workspace that lives until the stream has passed the call. They may be captured in a CUDA graph.
#pragma once

#ifndef SISA_CUDA_SHIM  // tests/cuda_shim.h, which runs the kernels on the host, stands in for it
#include <cuda_runtime.h>
#endif

#include "../sisa.h"

namespace sisa::cuda {

constexpr int64_t kMaxStateWidth = 256;  // a chunk's cosines and sines lie in 48 KiB of shared memory

// The doubles that each needs.
int64_t augment_workspace(const AugmentParams& params);
int64_t augment_backward_workspace(const AugmentParams& params);

cudaError_t augment(const AugmentParams& params, double* workspace, cudaStream_t stream);
cudaError_t augment_backward(const AugmentBackwardParams& params, double* workspace, cudaStream_t stream);

}  // namespace sisa::cuda
