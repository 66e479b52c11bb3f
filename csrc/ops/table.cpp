// One ISA's kernel table; compiled once per ISA.

#include "ops/table.h"

namespace hexad::HEXAD_NAMESPACE {

#define HEXAD_STRING(x) #x
#define HEXAD_NAME(x) HEXAD_STRING(x)

void fill_kernels(Kernels& table) {
  table = Kernels{};
  table.isa = HEXAD_NAME(HEXAD_NAMESPACE);
  fill_linear(table);
  fill_rows(table);
  fill_attention(table);
  fill_logits(table);
}

}  // namespace hexad::HEXAD_NAMESPACE
