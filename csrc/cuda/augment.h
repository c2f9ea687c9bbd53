// The launchers of the augmentation's CUDA kernels. They allocate nothing and never wait for the device: the caller gives a
// workspace that lives until the stream has passed the call. They may be captured in a CUDA graph. No type of CUDA's here: what
// calls them needs neither its headers nor its libraries.
#pragma once

#include "../sisa.h"

namespace sisa::cuda {

constexpr int64_t kMaxStateWidth = 256;  // a chunk's cosines and sines lie in 48 KiB of shared memory

// The doubles that each needs.
int64_t augment_workspace(const AugmentParams& params);
int64_t augment_backward_workspace(const AugmentParams& params);

// On a cudaStream_t; what went wrong, or null.
const char* augment(const AugmentParams& params, double* workspace, void* stream);
const char* augment_backward(const AugmentBackwardParams& params, double* workspace, void* stream);

}  // namespace sisa::cuda
