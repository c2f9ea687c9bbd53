// Loops over torch's own threads, with no torch type in sight.
#pragma once

#include <cstdint>
#include <type_traits>

namespace sisa {

using Body = void (*)(int64_t begin, int64_t end, void* context);

// Calls body over parts of [begin, end), each of at least grain where there are that many, on torch's threads; on this one alone
// within another such loop. What a body throws is thrown here.
void parallel_for(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// The threads that it runs on outside of any other loop.
int64_t thread_count();

template <class F>
__attribute__((always_inline)) inline void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& f) {
  const Body body = [](int64_t lo, int64_t hi, void* context) { (*static_cast<std::remove_reference_t<F>*>(context))(lo, hi); };
  parallel_for(begin, end, grain, body, &f);
}

}  // namespace sisa
