// Memory that is allocated without exceptions: the first exception of a thread allocates memory itself, and ends the
// process if there is none.

#pragma once

#include <cstdint>
#include <cstdlib>

// Number of bytes that a set of buffers needs, and whether all of them could be allocated.
struct Memory {
  int64_t bytes = 0;
  bool enough = true;
};

// Array of fixed size, not initialized, that begins at a cache line.
template <class T> class Buffer {
  static constexpr uintptr_t ALIGNMENT = 64;
  void* allocated = nullptr;
  T* values = nullptr;

 public:
  Buffer(Memory& memory, int64_t size) {
    if (size <= 0) return;
    const int64_t bytes = size * int64_t(sizeof(T));
    allocated = malloc(size_t(bytes) + ALIGNMENT);
    values = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(allocated) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    memory.bytes += bytes;
    memory.enough &= allocated != nullptr;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(allocated); }

  T* data() { return values; }
  const T* data() const { return values; }
  T& operator[](int64_t i) { return values[i]; }
  const T& operator[](int64_t i) const { return values[i]; }
};
