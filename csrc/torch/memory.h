// Workspace from torch's allocator.
#pragma once

#include <c10/core/CPUAllocator.h>
#include <c10/util/SmallVector.h>

#include <algorithm>

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

}  // namespace pyperc
