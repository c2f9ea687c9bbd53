// Which instruction set's kernels run here; this file is compiled for the platform's own alone.

#include <cstdlib>
#include <cstring>

#include "sisa.h"

namespace sisa::cpu {

namespace portable {
extern const Kernels kernels;
}

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const char* isa;
  const Kernels& kernels;
  bool here;  // this CPU, and its operating system, run it
};

#if defined(__x86_64__)
#define SISA_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#else
#define SISA_HAS(feature) false
#endif

Level choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const Level levels[] = {
      {"default", portable::kernels, true},
#if defined(__x86_64__)
      {"avx2", avx2::kernels, SISA_HAS("avx2") && SISA_HAS("fma") && SISA_HAS("f16c")},
      {"avx512", avx512::kernels,
       SISA_HAS("avx512f") && SISA_HAS("avx512dq") && SISA_HAS("avx512vl") && SISA_HAS("avx512bw")},
      {"avx512_bf16", avx512_bf16::kernels, SISA_HAS("avx512bf16")},
#endif
  };
  const char* most = std::getenv("SISA_CPU_ISA");
  const Level* best = levels;
  for (const Level& level : levels) {
    if (!level.here) break;
    best = &level;
    if (most && std::strcmp(level.isa, most) == 0) break;
  }
  return *best;
}

const Level& chosen() {
  static const Level level = choose();
  return level;
}

}  // namespace

const Kernels& kernels() {
  return chosen().kernels;
}

const char* isa() {
  return chosen().isa;
}

}  // namespace sisa::cpu
