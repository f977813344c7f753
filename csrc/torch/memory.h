// Workspace from torch's allocator, and what spares the pages of fresh memory.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "../core/mlp.h"

namespace pyperc {

// glibc's malloc maps larger blocks anew each time.
constexpr size_t MOST_KEPT = size_t{32} << 20;

// Says that tensors of so many bytes in all will be made and freed together, call after call. glibc's malloc gives the
// top of its heap back to the system where more is free there than twice the largest block that it has unmapped, so
// that each call would fault its pages in anew: most of the time of one row through layers of 1024, forward and
// backward. One block of that size, freed untouched, teaches it.
inline void expect_to_come_again(size_t bytes) {
  constexpr size_t LEAST = size_t{1} << 20, MOST = MOST_KEPT - (size_t{64} << 10);
  static std::atomic<size_t> taught{LEAST};
  bytes = std::min(bytes, MOST);
  if (bytes <= taught.load(std::memory_order_relaxed)) return;
  taught.store(bytes, std::memory_order_relaxed);
  void* volatile block = std::malloc(bytes);
  std::free(block);
}

// A fresh tensor of more than malloc keeps comes as new pages: in large ones, where the system has them, it takes a
// 512th of the faults, which are 4 to 5% of a product of 4096 cubed.
inline void prefer_large_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: no harm where it is refused
#endif
}

// For as long as a pass asks for it; little is at hand.
class TorchMemory : public Memory {
 public:
  void* take(size_t bytes) override {
    if (bytes <= sizeof(little_) && !taken_) {
      taken_ = true;
      return little_;
    }
    pieces_.push_back(c10::GetCPUAllocator()->allocate(bytes));
    return pieces_.back().get();
  }
  void give_back(void* memory) override {
    if (memory == little_) {
      taken_ = false;
      return;
    }
    const auto is_it = [&](const c10::DataPtr& piece) { return piece.get() == memory; };
    pieces_.erase(std::find_if(pieces_.begin(), pieces_.end(), is_it));
  }

 private:
  alignas(64) char little_[2048];
  bool taken_ = false;
  c10::SmallVector<c10::DataPtr, 4> pieces_;
};

}  // namespace pyperc
