// The scheduler of a block's threads, and guarded memory.
#include "emulator.h"

#include <setjmp.h>
#include <signal.h>

#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "fiber.h"

namespace pyperc::cuda::emulate {

namespace {

constexpr int LANES = 32, BARRIERS = 16;
constexpr size_t MOST_SHARED = 227 << 10;  // a block's on Hopper
#if defined(__SANITIZE_ADDRESS__)
constexpr bool SANITIZED = true;
constexpr size_t STACK = 512 << 10;
#else
constexpr bool SANITIZED = false;
constexpr size_t STACK = 128 << 10;
#endif

// `bytes` of memory that end at a page which cannot be touched, or up to 15 bytes before it. Nothing is written into
// the memory itself, so that one of many gigabytes costs what is used of it.
class Guarded {
 public:
  Guarded(size_t bytes, Placement placement) : pages_(bytes), bytes_(bytes), data_(pages_.end() - bytes) {
    if (placement == Placement::Aligned) data_ -= reinterpret_cast<uintptr_t>(data_) % 16;
    std::memset(data_ + bytes_, FILL, slack());
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(data_ + bytes_, slack());
    if (bytes_ < (size_t{1} << 30)) {
      ASAN_POISON_MEMORY_REGION(pages_.begin(), static_cast<size_t>(data_ - pages_.begin()));
    }
#endif
  }
  ~Guarded() {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(pages_.begin(), static_cast<size_t>(data_ - pages_.begin()));
    ASAN_UNPOISON_MEMORY_REGION(data_ + bytes_, slack());
#endif
  }
  std::byte* data() const { return data_; }
  size_t size() const { return bytes_; }
  bool near(const void* p) const { return pages_.near(p); }
  bool intact() const {
    for (size_t i = 0; !SANITIZED && i < slack(); ++i) {
      if (data_[bytes_ + i] != std::byte{FILL}) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char FILL = 0xff;
  size_t slack() const { return static_cast<size_t>(pages_.end() - data_) - bytes_; }

  Pages pages_;
  size_t bytes_;
  std::byte* data_;
};

enum class State { Ready, Together, Barrier, Done };

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};
void perform(const Copy& c) {
  std::memcpy(c.to, c.from, static_cast<size_t>(c.valid));
  std::memset(static_cast<std::byte*>(c.to) + c.valid, 0, static_cast<size_t>(c.bytes - c.valid));
}

struct Fiber {
  Identity identity{};
  State state = State::Ready;
  Context context;
  Pages stack{STACK};
  Operation operation = nullptr;
  const char* name = nullptr;
  void* argument = nullptr;
  int barrier = 0;
  std::vector<std::vector<Copy>> groups;  // committed and not waited for, the oldest first
  std::vector<Copy> open;
};

struct Barrier {
  int waiting = 0, count = 0;
};

struct Machine {
  Settings settings;
  Counts counts{};
  std::string message;
  std::map<void*, std::unique_ptr<Guarded>> memory;

  const std::function<void()>* kernel = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch, for their stacks
  Fiber* running = nullptr;
  Context scheduler;
  std::unique_ptr<Guarded> shared;
  Barrier barriers[BARRIERS];
  bool failed = false;
  std::mt19937_64 random;
  sigjmp_buf out;
  void* fault = nullptr;
};

Machine& machine() {
  static Machine machine;
  return machine;
}

struct Mistake {};

std::string place(const Fiber& f) {
  return "thread " + std::to_string(f.identity.thread) + " of block " + std::to_string(f.identity.block) + ": ";
}

// What a fiber runs.
void entry() {
  Machine& m = machine();
  Context::arrived(m.scheduler);
  try {
    (*m.kernel)();
  } catch (const Mistake&) {
    m.failed = true;
  }
  m.running->state = State::Done;
  m.running->context.go(m.scheduler);
}

void yield(State state) {
  Machine& m = machine();
  m.running->state = state;
  m.running->context.go(m.scheduler);
}

// One block: its warps in random order, each until none of its threads can go on alone.
class Block {
 public:
  Block(int64_t block, int64_t blocks, int threads, size_t shared) : m_(machine()), threads_(threads) {
    m_.shared = std::make_unique<Guarded>(shared, Placement::End);
    std::memset(m_.shared->data(), 0xff, shared);
    for (Barrier& barrier : m_.barriers) barrier = {};
    for (int t = 0; t < threads; ++t) {
      Fiber& f = *m_.fibers[static_cast<size_t>(t)];
      f.identity = {t, threads, block, blocks};
      f.state = State::Ready;
      f.groups.clear();
      f.open.clear();
      f.context.prepare(f.stack, entry);
    }
    // How likely a warp goes on that has just run: always, and it runs ahead of the others as far as it can.
    loyalty_ = static_cast<int>(m_.random() % 3) * 50;
  }

  void run() {
    int last = -1;
    while (!m_.failed) {
      std::vector<int> runnable;
      for (int w = 0; w < threads_ / LANES; ++w) {
        if (any(w, State::Ready)) runnable.push_back(w);
      }
      if (runnable.empty()) {
        if (!release()) break;
        continue;
      }
      const bool stay = last >= 0 && any(last, State::Ready) && static_cast<int>(m_.random() % 100) < loyalty_;
      if (!stay) last = runnable[m_.random() % runnable.size()];
      run(last);
    }
    if (!m_.failed && !finished()) stuck();
  }

 private:
  Fiber& fiber(int t) const { return *m_.fibers[static_cast<size_t>(t)]; }
  bool any(int warp, State state) const {
    for (int i = 0; i < LANES; ++i) {
      if (fiber(warp * LANES + i).state == state) return true;
    }
    return false;
  }

  void run(int warp) {
    const uint64_t draw = m_.random();
    const int start = static_cast<int>(draw % LANES), step = static_cast<int>(draw / LANES % LANES) | 1;
    for (int i = 0; i < LANES && !m_.failed; ++i) {
      Fiber& f = fiber(warp * LANES + (start + i * step) % LANES);
      if (f.state != State::Ready) continue;
      m_.running = &f;
      ++m_.counts.switches;
      m_.scheduler.go(f.context);
    }
    m_.running = nullptr;
    if (!m_.failed) carry_out(warp);
  }

  // The operation that all lanes of the warp have come to, if they have.
  void carry_out(int warp) {
    void* arguments[LANES];
    const Fiber& first = fiber(warp * LANES);
    for (int i = 0; i < LANES; ++i) {
      const Fiber& f = fiber(warp * LANES + i);
      if (f.state != State::Together || f.operation != first.operation) return;
      arguments[i] = f.argument;
    }
    m_.running = m_.fibers[static_cast<size_t>(warp * LANES)].get();
    try {
      first.operation(arguments);
    } catch (const Mistake&) {
      m_.failed = true;
    }
    for (int i = 0; i < LANES; ++i) fiber(warp * LANES + i).state = State::Ready;
  }

  // The barriers to which all have come that are to come.
  bool release() {
    bool any = false;
    for (int id = 0; id < BARRIERS; ++id) {
      Barrier& barrier = m_.barriers[id];
      if (!barrier.waiting || barrier.waiting != barrier.count) continue;
      for (int t = 0; t < threads_; ++t) {
        if (fiber(t).state == State::Barrier && fiber(t).barrier == id) fiber(t).state = State::Ready;
      }
      barrier = {};
      any = true;
    }
    return any;
  }

  bool finished() const {
    for (int t = 0; t < threads_; ++t) {
      if (fiber(t).state != State::Done) return false;
    }
    return true;
  }

  void stuck() {
    std::map<std::string, int> where;
    for (int t = 0; t < threads_; ++t) {
      const Fiber& f = fiber(t);
      if (f.state == State::Done) ++where["the end"];
      if (f.state == State::Barrier) ++where["barrier " + std::to_string(f.barrier)];
      if (f.state == State::Together) ++where[f.name];
    }
    m_.message = "block " + std::to_string(fiber(0).identity.block) + " waits for ever:";
    for (const auto& [name, count] : where) m_.message += " " + std::to_string(count) + " threads at " + name + ",";
    m_.message.pop_back();
    m_.failed = true;
  }

  Machine& m_;
  const int threads_;
  int loyalty_;
};

// An access to memory that cannot be touched ends the launch.
void on_fault(int number, siginfo_t* info, void*) {
  Machine& m = machine();
  if (!m.running) {  // not a kernel's
    signal(number, SIG_DFL);
    return;
  }
  m.fault = info->si_addr;
  siglongjmp(m.out, 1);
}

std::string describe_fault(const Machine& m) {
  const auto* p = static_cast<const std::byte*>(m.fault);
  const auto outside = [&](const Guarded& g, const std::string& what) {
    const std::ptrdiff_t offset = p - g.data();
    return place(*m.running) + "an access to byte " + std::to_string(offset) + " of " + what + " of " +
           std::to_string(g.size()) + " bytes";
  };
  if (m.shared->near(p)) return outside(*m.shared, "the shared memory");
  for (const auto& [data, guarded] : m.memory) {
    if (guarded->near(p)) return outside(*guarded, "a buffer");
  }
  return place(*m.running) + "an access to memory that is nobody's";
}

// While a launch runs, its faults come here, on a stack of their own.
class FaultHandler {
 public:
  FaultHandler() {
    if (SANITIZED) return;  // which reports them itself
    stack_t stack{};
    stack.ss_sp = stack_;
    stack.ss_size = sizeof(stack_);
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~FaultHandler() {
    if (SANITIZED) return;
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  alignas(16) char stack_[64 << 10];
  stack_t old_stack_{};
  struct sigaction old_segv_{}, old_bus_{};
};

}  // namespace

Settings& settings() { return machine().settings; }
Counts& counts() { return machine().counts; }
const std::string& message() { return machine().message; }

int launch(const std::function<void()>& kernel, int64_t blocks, int threads, size_t shared) {
  Machine& m = machine();
  m.message.clear();
  m.failed = false;
  m.kernel = &kernel;
  m.random.seed(m.settings.seed);
  ++m.counts.launches;
  if (blocks < 1 || blocks > INT32_MAX || threads < LANES || threads > 1024 || threads % LANES ||
      shared > MOST_SHARED) {
    m.message = "a launch of " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads with " +
                std::to_string(shared) + " bytes of shared memory";
    return 1;
  }
  while (m.fibers.size() < static_cast<size_t>(threads)) m.fibers.push_back(std::make_unique<Fiber>());
  const FaultHandler handler;
  // Blocks come in any order: a permutation of them, by a step that has no factor in common with their number.
  int64_t step = 1 + static_cast<int64_t>(m.random() % static_cast<uint64_t>(blocks));
  while (std::gcd(step, blocks) != 1) step = step % blocks + 1;
  int64_t next = static_cast<int64_t>(m.random() % static_cast<uint64_t>(blocks));
  for (int64_t i = 0; i < blocks && !m.failed; ++i, next = (next + step) % blocks) {
    ++m.counts.blocks;
    Block block(next, blocks, threads, shared);
    if (sigsetjmp(m.out, 1)) {
      m.message = describe_fault(m);
      m.failed = true;
    } else {
      block.run();
    }
  }
  m.running = nullptr;
  for (const auto& [data, guarded] : m.memory) {
    if (m.failed || guarded->intact()) continue;
    m.message = "a store behind the end of a buffer of " + std::to_string(guarded->size()) + " bytes";
    m.failed = true;
  }
  m.shared.reset();
  return m.failed ? 1 : 0;
}

void* allocate(size_t bytes, Placement placement) {
  auto guarded = std::make_unique<Guarded>(bytes, placement);
  void* data = guarded->data();
  machine().memory[data] = std::move(guarded);
  return data;
}
void release(void* memory) { machine().memory.erase(memory); }

const Identity& self() { return machine().running->identity; }
std::byte* shared() { return machine().shared->data(); }
size_t shared_size() { return machine().shared->size(); }

void fail(const std::string& what) {
  Machine& m = machine();
  m.message = (m.running ? place(*m.running) : "") + what;
  throw Mistake{};
}

void barrier(int id, int count) {
  Machine& m = machine();
  if (id < 0 || id >= BARRIERS || count < LANES || count % LANES || count > m.running->identity.threads) {
    fail("barrier " + std::to_string(id) + " of " + std::to_string(count) + " threads");
  }
  Barrier& b = m.barriers[id];
  if (b.waiting && b.count != count) fail("barrier " + std::to_string(id) + " with another number of threads");
  b.count = count;
  if (++b.waiting > count) fail("barrier " + std::to_string(id) + ": more threads than it is for");
  m.running->barrier = id;
  yield(State::Barrier);
}

void together(Operation operation, const char* name, void* argument) {
  Fiber& f = *machine().running;
  f.operation = operation;
  f.name = name;
  f.argument = argument;
  yield(State::Together);
}

void copy(void* to, const void* from, int bytes, int valid) {
  Machine& m = machine();
  ++m.counts.copies;
  const Copy c{to, from, bytes, valid};
  if (m.settings.copies == Copies::Eager) {
    perform(c);
  } else {
    m.running->open.push_back(c);
  }
}
void commit() {
  Fiber& f = *machine().running;
  f.groups.push_back(std::move(f.open));
  f.open.clear();
}
void wait(int groups) {
  Fiber& f = *machine().running;
  while (f.groups.size() > static_cast<size_t>(groups)) {
    for (const Copy& c : f.groups.front()) perform(c);
    f.groups.erase(f.groups.begin());
  }
}

}  // namespace pyperc::cuda::emulate
