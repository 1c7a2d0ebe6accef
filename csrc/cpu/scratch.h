// One allocation for all the scratch of a call.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>
#include <vector>

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
    memory_ = at::empty({size_}, at::CppTypeToScalarType<S>::value);
    S* base = memory_.template mutable_data_ptr<S>();
    for (auto& [to, offset] : wants_) *to = base + offset;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(S);
  std::vector<std::pair<S**, int64_t>> wants_;
  int64_t size_ = 0;
  at::Tensor memory_;
};

}  // namespace fusedrnn
