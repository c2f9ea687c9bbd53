// What all operators stand on: torch's threads, and the record of the build. The library is bound to torch's stable ABI alone, so that
// one file serves every torch from TORCH_TARGET_VERSION on. The operators' schemas are defined in Python (sisa_kernels/ops.py).

#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "../parallel.h"
#include "../sisa.h"

namespace sisa {

void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context) {
  if (torch_parallel_for(begin, end, grain, body, context) != 0) throw std::runtime_error("a loop of sisa's kernels failed");
}

int64_t thread_count() {
  uint32_t count = 1;
  torch_get_num_threads(&count);
  return count;
}

namespace {

// _extension.py reads this record from the file before loading it, to see whether it is of the sources beside it.
#define SISA_FIELD(name, value) "\n" name "=" value
extern const char build_record[];
const char build_record[] = "sisa build record" SISA_FIELD("sources", SISA_SOURCES) SISA_FIELD("headers", "torch " SISA_TORCH)
    SISA_FIELD("compiler", "g++ " __VERSION__) SISA_FIELD("flags", SISA_FLAGS) SISA_FIELD("cuda_archs", SISA_CUDA_ARCHS) "\n";

std::string build_info() {
  return std::string(build_record) + "isa=" + cpu::isa() + "\n";
}

}  // namespace

}  // namespace sisa

STABLE_TORCH_LIBRARY_FRAGMENT(sisa, m) {
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sisa, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&sisa::build_info));
}
