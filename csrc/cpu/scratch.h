// One allocation for all the scratch of a call.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/memory.h"

namespace fusedrnn {

// want() notes a pointer to be set, allocate() sets them all, 64-byte aligned; the memory lives as
// long as the object.
class Scratch {
 public:
  Scratch() { wants_.reserve(32); }

  template <class T>
  void want(T** to, int64_t values) {
    wants_.push_back(
        {to,
         [](void* pointer, char* data) { *static_cast<T**>(pointer) = reinterpret_cast<T*>(data); },
         size_});
    size_ += (values * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }

  void allocate() {
    char* base = static_cast<char*>(block_.emplace(size_).data());
    for (const Want& want : wants_) want.set(want.pointer, base + want.offset);
  }

 private:
  static constexpr int64_t kAlign = 64;
  struct Want {
    void* pointer;
    void (*set)(void* pointer, char* data);
    int64_t offset;
  };
  std::vector<Want> wants_;
  int64_t size_ = 0;
  std::optional<Block> block_;
};

}  // namespace fusedrnn
