// A stack of its own, and the switch from one to another.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace pyperc::cuda::emulate {

// Pages that may be used, between two that may not.
class Pages {
 public:
  explicit Pages(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    size_ = inner + 2 * page;
    void* all = mmap(nullptr, size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    all_ = static_cast<std::byte*>(all);
    begin_ = all_ + page;
    end_ = begin_ + inner;
    if (inner && mprotect(begin_, inner, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
  }
  ~Pages() { munmap(all_, size_); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  std::byte* begin() const { return begin_; }
  std::byte* end() const { return end_; }
  bool near(const void* p) const { return p >= all_ && p < all_ + size_; }

 private:
  std::byte *all_, *begin_, *end_;
  size_t size_;
};

// A place to go on from: the machine's own stack, or a stack with a function to begin there.
class Context {
 public:
  void prepare(const Pages& stack, void (*entry)()) {
#if defined(__SANITIZE_ADDRESS__)
    bottom_ = stack.begin();
    size_ = static_cast<size_t>(stack.end() - stack.begin());
    fake_ = nullptr;
    ASAN_UNPOISON_MEMORY_REGION(bottom_, size_);
#endif
#if defined(__x86_64__)
    // What `change` pops: six registers and the address to return to; above it the stack is aligned as after a call.
    auto* top = reinterpret_cast<void**>(stack.end()) - 1;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    place_ = top;
#else
    getcontext(&place_);
    place_.uc_stack.ss_sp = stack.begin();
    place_.uc_stack.ss_size = static_cast<size_t>(stack.end() - stack.begin());
    place_.uc_link = nullptr;
    makecontext(&place_, entry, 0);
#endif
  }

  // Goes on at `to`; returns when something comes back here.
  void go(Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
    change(&place_, to.place_);
#else
    swapcontext(&place_, &to.place_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#endif
  }

  // What a context does first when it runs; `from` is the one that went there.
  static void arrived([[maybe_unused]] Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#endif
  }

 private:
#if defined(__x86_64__)
  // ucontext would change the signal mask, two system calls a switch.
  __attribute__((naked, noinline)) static void change(void** /*from*/, void* /*to*/) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
  }
  void* place_ = nullptr;
#else
  ucontext_t place_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace pyperc::cuda::emulate
