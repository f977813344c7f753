// Runs a kernel's body on the processor: the threads of a block are fibers, scheduled at random a warp at a time.
//
// A thread runs until it needs others: at a barrier, or at an operation of its whole warp, which is carried out in
// software when all 32 have come. Which warp goes on, and in which order its threads do, is drawn from the seed; so
// what a missing barrier leaves to chance comes out differently from seed to seed. Asynchronous copies happen as early
// (`Eager`) or as late (`Lazy`) as the program allows. Shared memory holds NaN at first and ends at a page that cannot
// be read or written; memory from `allocate` does too. A mistake ends the launch, and `message` says which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace pyperc::cuda::emulate {

enum class Copies { Eager, Lazy };

struct Settings {
  uint64_t seed = 0;
  Copies copies = Copies::Eager;
};

// What the launches since the last `reset` did.
struct Counts {
  int64_t launches, blocks, switches;
  int64_t ldmatrix, conflicts;  // matrices of 8 rows loaded; rows that shared banks with an earlier row of theirs
  int64_t mma, copies;
};

Settings& settings();
Counts& counts();

// 0, or 1 where the kernel made a mistake.
int launch(const std::function<void()>& kernel, int64_t blocks, int threads, size_t shared);
const std::string& message();

// Memory between two pages that cannot be read or written. `Placement::End`: its last byte is the last before the page,
// whatever the alignment; `Aligned`: it begins at a multiple of 16, and the bytes up to the page, at most 15, are
// checked after each launch.
enum class Placement { End, Aligned };
void* allocate(size_t bytes, Placement placement);
void release(void* memory);

// For the primitives: the thread that runs.
struct Identity {
  int thread, threads;
  int64_t block, blocks;
};
const Identity& self();
std::byte* shared();
size_t shared_size();

// Ends the launch.
[[noreturn]] void fail(const std::string& what);

// All threads (id 0), or `count` threads, at a barrier.
void barrier(int id, int count);

// Waits until all lanes have come to the same operation. The last to come calls operation(arguments), the 32 lanes'.
using Operation = void (*)(void* const* arguments);
void together(Operation operation, const char* name, void* argument);

void copy(void* to, const void* from, int bytes, int valid);
void commit();
void wait(int groups);

}  // namespace pyperc::cuda::emulate
