// What the CPU kernels share beside vectors: scratch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <new>

#include "isa.h"
#include "vector.h"

namespace sisa::cpu::SISA_ISA {

// Zeroed scratch, aligned to cache lines and padded so that vector loops may run over its end.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    const size_t bytes = (size * sizeof(T) + 2 * sizeof(Vec) + 63) / 64 * 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    std::memset(static_cast<void*>(data_), 0, bytes);
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace sisa::cpu::SISA_ISA
