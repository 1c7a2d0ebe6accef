// One allocation for all the scratch of a call.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "cpu/memory.h"

namespace fusedrnn {

// want() notes a pointer to be set, which stays where it is until allocate() sets them all, 64-byte
// aligned; the memory lives as long as the object.
class Scratch {
 public:
  Scratch() { wants_.reserve(32); }

  template <class T>
  void want(T** to, int64_t values) {
    note(to, values, /*zeros=*/0);
  }
  template <class T>
  void want_zeros(T** to, int64_t values) {
    note(to, values, values * static_cast<int64_t>(sizeof(T)));
  }

  void allocate() {
    char* base = static_cast<char*>(block_.emplace(size_).data());
    for (const Want& want : wants_) {
      want.set(want.pointer, base + want.offset);
      if (want.zeros > 0) std::memset(base + want.offset, 0, want.zeros);
    }
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct Want {
    void* pointer;
    void (*set)(void* pointer, char* data);
    int64_t offset;
    int64_t zeros;  // bytes
  };

  template <class T>
  void note(T** to, int64_t values, int64_t zeros) {
    wants_.push_back(
        {to,
         [](void* pointer, char* data) { *static_cast<T**>(pointer) = reinterpret_cast<T*>(data); },
         size_, zeros});
    size_ += (values * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

  std::vector<Want> wants_;
  int64_t size_ = 0;
  std::optional<MemoryBlock> block_;
};

}  // namespace fusedrnn
