// What the CPU kernels share beside vectors: zeroed scratch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../sisa.h"
#include "vector.h"

namespace sisa::cpu {

// Zeroed scratch, aligned to cache lines and padded so that vector loops may run over its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (size * sizeof(T) + 2 * sizeof(Vec) + 63) / 64 * 64;
    data_.reset(static_cast<T*>(std::aligned_alloc(64, bytes)));
    if (!data_) throw std::bad_alloc();
    std::memset(data_.get(), 0, bytes);
  }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

}  // namespace sisa::cpu
