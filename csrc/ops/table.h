// Each op family fills its part of an ISA's kernel table.
#pragma once

#include "kernels.h"

namespace hexad::HEXAD_NAMESPACE {

void fill_linear(Kernels& table);
void fill_rows(Kernels& table);
void fill_attention(Kernels& table);
void fill_logits(Kernels& table);

}  // namespace hexad::HEXAD_NAMESPACE
