// Memory that is allocated without exceptions, because an exception must not leave a thread or the library.

#pragma once

#include <cstdint>
#include <memory>
#include <new>

// Number of bytes that a set of buffers needs, and whether all of them could be allocated.
struct Memory {
  int64_t bytes = 0;
  bool enough = true;
};

// Array of fixed size, not initialized, that begins at a cache line.
template <class T> class Buffer {
  static constexpr std::align_val_t ALIGNMENT{64};
  struct Delete {
    void operator()(T* values) const { ::operator delete[](values, ALIGNMENT); }
  };
  std::unique_ptr<T[], Delete> values;

 public:
  Buffer(Memory& memory, int64_t size)
      : values(static_cast<T*>(::operator new[](size * sizeof(T), ALIGNMENT, std::nothrow))) {
    memory.bytes += size * int64_t(sizeof(T));
    memory.enough &= values != nullptr;
  }
  T* data() { return values.get(); }
  const T* data() const { return values.get(); }
  T& operator[](int64_t i) { return values[i]; }
  const T& operator[](int64_t i) const { return values[i]; }
};
