// Workspace from torch's allocator.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "../core/mlp.h"

namespace pyperc {

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

// Says that tensors of so many bytes in all will be made and freed together, call after call. glibc's malloc gives the
// top of its heap back to the system where more is free there than twice the largest block that it has unmapped, so
// that each call would fault its pages in anew: most of the time of one row through layers of 1024, forward and
// backward. One block of that size, freed untouched, teaches it. Malloc itself ends this rule at 32 MB.
inline void expect_to_come_again(size_t bytes) {
  constexpr size_t LEAST = size_t{1} << 20, MOST = (size_t{32} << 20) - (size_t{64} << 10);
  static std::atomic<size_t> taught{LEAST};
  bytes = std::min(bytes, MOST);
  if (bytes <= taught.load(std::memory_order_relaxed)) return;
  taught.store(bytes, std::memory_order_relaxed);
  void* volatile block = std::malloc(bytes);
  std::free(block);
}

}  // namespace pyperc
