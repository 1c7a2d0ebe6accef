// One allocation for all the scratch of a call.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/memory.h"

namespace fusedrnn {

// want() notes a pointer to be set, allocate() sets them all, 64-byte aligned; the memory lives as
// long as the object.
template <class S>
class Scratch {
 public:
  void want(S** to, int64_t values) {
    wants_.push_back({to, size_});
    size_ += (values + kAlign - 1) / kAlign * kAlign;
  }

  void allocate() {
    S* base = static_cast<S*>(block_.emplace(size_ * sizeof(S)).data());
    for (auto& [to, offset] : wants_) *to = base + offset;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(S);
  std::vector<std::pair<S**, int64_t>> wants_;
  int64_t size_ = 0;
  std::optional<Block> block_;
};

}  // namespace fusedrnn
