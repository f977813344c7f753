// What the passes over a network share: the workspace, who does which part, rows of a matrix.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "../core/mlp.h"

namespace pyperc {

// Hands out pieces of so much memory; without memory it only counts them.
class Arena {
 public:
  Arena(void* memory, size_t size) : memory_(static_cast<char*>(memory)), size_(size) {}
  static Arena counting() { return Arena(nullptr, 0); }
  template <class T>
  T* take(int64_t count) {
    const size_t begin = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (memory_ && used_ > size_) throw std::logic_error("pyperc: a workspace is smaller than what is taken from it");
    return memory_ ? reinterpret_cast<T*>(memory_ + begin) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t size_, used_ = 0;
};

// Memory that each thread keeps, for what no two passes need at once: fresh memory costs its page faults, and none
// where nobody writes. With 256 KB ds^T x of 512 to 2048 cubed takes 1.04 to 1.1 times as long (Zen 3), with
// 1 MB no less; from 768 KB on a process holds more than beside plain torch, whose BLAS keeps about as much. Not on the
// stack, of which another thread than the first may have little.
constexpr size_t THREAD_MEMORY = 512 * 1024;
// What the threads of a pass share may take of it, in that of the first, beside what each has for itself.
constexpr size_t MOST_SHARED = THREAD_MEMORY / 2;
inline char* thread_memory() {
  struct alignas(64) Block {
    char memory[THREAD_MEMORY];
  };
  thread_local const auto block = std::make_unique_for_overwrite<Block>();
  return block->memory;
}

struct Kept {
  char* memory = nullptr;
  size_t size = 0;
};
// What is left of it behind that many bytes that each thread uses for itself; all, if those do not fit there.
inline Kept left_of_thread_memory(size_t used) {
  if (used > THREAD_MEMORY) used = 0;
  return {thread_memory() + used, THREAD_MEMORY - used};
}

// Each thread's room for whatever it does at one time: what it keeps, if that will do, or part of a workspace.
class Scratch {
 public:
  // most(room) for all that is done with it, where room(arena) takes what one of them needs.
  template <class F>
  void lay_out(Arena& arena, int64_t threads, F most) {
    size_ = 0;
    most([&](auto room) {
      Arena count = Arena::counting();
      room(count);
      size_ = std::max(size_, count.used());
    });
    memory_ = size_ > THREAD_MEMORY ? arena.take<char>(threads * static_cast<int64_t>(size_)) : nullptr;
  }
  Arena of(int64_t t) const {
    return Arena(memory_ ? memory_ + t * static_cast<int64_t>(size_) : thread_memory(), size_);
  }
  // What the first thread keeps beside it, and beside that many bytes more.
  Kept left(size_t more = 0) const { return left_of_thread_memory(size_ + more); }

 private:
  char* memory_ = nullptr;
  size_t size_ = 0;
};

// Memory that is laid out by lay_out(arena): once to count it, once more to hand it out; in kept(), if it fits there.
class Workspace {
 public:
  template <class F>
  Workspace(Memory& owner, F lay_out) : Workspace(owner, lay_out, [] { return Kept{}; }) {}
  template <class F, class K>
  Workspace(Memory& owner, F lay_out, K kept) : owner_(owner) {
    Arena count = Arena::counting();
    lay_out(count);
    if (count.used() == 0) return;
    const Kept room = kept();
    if (count.used() > room.size) memory_ = owner.take(count.used());
    if (!memory_) kept_ = count.used();
    Arena arena(memory_ ? memory_ : room.memory, count.used());
    lay_out(arena);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (memory_) owner_.give_back(memory_);
  }
  // Bytes that lie in kept().
  size_t kept() const { return kept_; }

 private:
  Memory& owner_;
  void* memory_ = nullptr;
  size_t kept_ = 0;
};

template <class F>
void run(const Parallel& parallel, int64_t n, F f) {
  if (n == 1) {
    f(0);
  } else if (n > 1) {
    parallel.run(n, [](void* context, int64_t i) { (*static_cast<F*>(context))(i); }, &f);
  }
}

// Part i of `parts` of [0, n), cut at multiples of `unit`.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range part(int64_t n, int64_t unit, int64_t i, int64_t parts) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, units * i / parts * unit), std::min(n, units * (i + 1) / parts * unit)};
}

template <class T>
Matrix<const T> rows_from(Matrix<const T> x, int64_t i) {
  return {x.data ? x.data + i * x.rs : nullptr, x.rs, x.cs};
}
template <class T>
Matrix<const T> transposed(Matrix<const T> x) {
  return {x.data, x.cs, x.rs};
}

template <class T>
void copy_rows(Matrix<const T> from, int64_t rows, int64_t columns, T* to, int64_t ld) {
  constexpr int64_t FEW = 8;  // fewer elements take less time than a call
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = from.data + i * from.rs;
    if (from.cs == 1 && columns >= FEW) {
      std::memcpy(to + i * ld, row, static_cast<size_t>(columns) * sizeof(T));
    } else {
      for (int64_t j = 0; j < columns; ++j) to[i * ld + j] = row[j * from.cs];
    }
  }
}

}  // namespace pyperc
