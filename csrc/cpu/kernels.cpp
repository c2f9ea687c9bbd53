// The table of one instruction set's kernels.

#include "kernels.h"

namespace sisa::cpu::SISA_ISA {

extern const Kernels kernels = {augment, augment_backward, decode, attention, attention_backward};

}  // namespace sisa::cpu::SISA_ISA
