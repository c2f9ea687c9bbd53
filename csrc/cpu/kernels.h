// What each instruction set defines (isa.h).
#pragma once

#include "../sisa.h"
#include "isa.h"

namespace sisa::cpu::SISA_ISA {

void augment(const AugmentParams& params);
void augment_backward(const AugmentBackwardParams& params);
void decode(const DecodeParams& params);
void attention(const AttentionParams& params);
void attention_backward(const AttentionBackwardParams& params);

}  // namespace sisa::cpu::SISA_ISA
