// Memory without the cost of fresh pages.
//
// The first touch of a page is a fault, 2 us on the machine of docs/performance.md: for the scratch
// of a short call more than its arithmetic, for what a long one saves a good part of it.
#pragma once

#include <cstddef>

namespace fusedrnn {

// 64-byte aligned, uninitialised memory. What is given back serves again: the process keeps up to
// kKeptBytes of it. From 2 MiB on it asks for huge pages (Linux): one fault where there were 512.
class MemoryBlock {
 public:
  static constexpr size_t kKeptBytes = size_t{256} << 20;
  // malloc keeps smaller ones at hand by itself.
  static constexpr size_t kLeastPooled = size_t{32} << 10;

  explicit MemoryBlock(size_t bytes);  // throws std::bad_alloc
  ~MemoryBlock();
  MemoryBlock(const MemoryBlock&) = delete;
  MemoryBlock& operator=(const MemoryBlock&) = delete;

  void* data() const { return data_; }

 private:
  void* data_;
  void* allocated_;  // what holds it
  size_t bytes_;     // 0: too few for the pool
};

// Gives what is kept back to the system.
void empty_cache();

}  // namespace fusedrnn
