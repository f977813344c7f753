// Workspace that is kept from call to call.
#pragma once

#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <utility>
#include <vector>

#include "../core/mlp.h"

namespace pyperc {

// For what asks for the same pieces each time.
class Pool final : public Memory {
 public:
  void* take(size_t bytes) override {
    // The smallest that is large enough, but not one that something much larger needs again; else the largest of those
    // that are too small makes way.
    Piece *best = nullptr, *small = nullptr;
    for (Piece& piece : pieces_) {
      if (piece.taken) continue;
      if (piece.bytes < bytes) {
        if (!small || piece.bytes > small->bytes) small = &piece;
      } else if (piece.bytes <= 4 * bytes && (!best || piece.bytes < best->bytes)) {
        best = &piece;
      }
    }
    if (!best) {
      best = small ? small : &pieces_.emplace_back();
      best->memory.clear();
      bytes_ -= std::exchange(best->bytes, 0);
      best->memory = c10::GetCPUAllocator()->allocate(bytes);
      bytes_ += best->bytes = bytes;
    }
    best->taken = true;
    return best->memory.get();
  }
  void give_back(void* memory) override {
    for (Piece& piece : pieces_) {
      if (piece.memory.get() == memory) piece.taken = false;
    }
  }
  void release() {
    pieces_.clear();
    bytes_ = 0;
  }
  size_t bytes() const { return bytes_; }  // any thread may ask

 private:
  struct Piece {
    c10::DataPtr memory;
    size_t bytes = 0;
    bool taken = false;
  };
  std::vector<Piece> pieces_;
  std::atomic<size_t> bytes_ = 0;
};

}  // namespace pyperc
