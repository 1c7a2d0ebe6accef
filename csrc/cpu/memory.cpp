#include "cpu/memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
  #include <sys/mman.h>
#endif

namespace fusedrnn {
namespace {

constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

struct Free {
  void* data;
  size_t bytes;
};

// Free blocks, the oldest first. Blocks come and go without waiting for it: who finds it busy goes
// to malloc, so a call in a child forked at a bad moment cannot hang. Only empty_cache() waits.
struct Pool {
  std::mutex mutex;
  std::vector<Free> blocks;
  size_t bytes = 0;

  Free take(size_t index) {
    const Free block = blocks[index];
    blocks.erase(blocks.begin() + static_cast<std::ptrdiff_t>(index));
    bytes -= block.bytes;
    return block;
  }
};

// Never destroyed: blocks come back from other threads while the process ends.
Pool& pool() {
  static Pool& instance = *new Pool;
  return instance;
}

// The smallest block that fits and is not out of all proportion, or none.
Free from_pool(size_t bytes) {
  const std::unique_lock lock(pool().mutex, std::try_to_lock);
  if (!lock) return {};
  const std::vector<Free>& blocks = pool().blocks;
  size_t best = blocks.size();
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (blocks[i].bytes < bytes || blocks[i].bytes / 4 > bytes) continue;
    if (best == blocks.size() || blocks[i].bytes < blocks[best].bytes) best = i;
  }
  return best < blocks.size() ? pool().take(best) : Free{};
}

bool to_pool(Free block) {
  const std::unique_lock lock(pool().mutex, std::try_to_lock);
  if (!lock) return false;
  pool().blocks.push_back(block);
  pool().bytes += block.bytes;
  while (pool().bytes > MemoryBlock::kKeptBytes) std::free(pool().take(0).data);
  return true;
}

}  // namespace

MemoryBlock::MemoryBlock(size_t bytes) {
  if (bytes < kLeastPooled) {
    // aligned_alloc takes thousands of instructions where malloc has such a block at hand.
    bytes_ = 0;
    allocated_ = std::malloc(bytes + kLine);
    if (allocated_ == nullptr) throw std::bad_alloc();
    data_ = reinterpret_cast<void*>(rounded(reinterpret_cast<uintptr_t>(allocated_), kLine));
    return;
  }
  const Free block = from_pool(bytes);
  data_ = allocated_ = block.data;
  bytes_ = block.bytes;
  if (data_ != nullptr) return;
  const size_t alignment = bytes >= kHugePage ? kHugePage : kLine;
  bytes_ = rounded(bytes, alignment);
  data_ = allocated_ = std::aligned_alloc(alignment, bytes_);
  if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // It is only advice: where the system has no huge pages, nothing changes.
  if (alignment == kHugePage) madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
}

MemoryBlock::~MemoryBlock() {
  const bool poolable = bytes_ >= kLeastPooled && bytes_ <= kKeptBytes;
  if (!poolable || !to_pool({data_, bytes_})) std::free(allocated_);
}

void empty_cache() {
  const std::lock_guard lock(pool().mutex);
  while (!pool().blocks.empty()) std::free(pool().take(0).data);
}

}  // namespace fusedrnn
