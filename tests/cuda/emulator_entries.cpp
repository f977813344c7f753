// The emulator's own settings, and memory that ends at a page which cannot be touched.
#include "../../csrc/cuda/emulate/emulator.h"
#include "entries.h"

namespace emulate = pyperc::cuda::emulate;

ENTRY void settings(int64_t seed, int64_t lazy) {
  emulate::settings() = {static_cast<uint64_t>(seed), lazy ? emulate::Copies::Lazy : emulate::Copies::Eager};
  emulate::counts() = {};
}
ENTRY const char* message() { return emulate::message().c_str(); }
ENTRY void counts(int64_t* numbers) {
  const emulate::Counts& c = emulate::counts();
  int64_t next = 0;
  for (const int64_t n : {c.launches, c.blocks, c.switches, c.ldmatrix, c.conflicts, c.mma, c.copies}) {
    numbers[next++] = n;
  }
}
ENTRY void* allocate(int64_t bytes, int64_t aligned) {
  return emulate::allocate(static_cast<size_t>(bytes), aligned ? emulate::Placement::Aligned : emulate::Placement::End);
}
ENTRY void release(void* memory) { emulate::release(memory); }
