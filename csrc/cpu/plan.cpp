// The thresholds of the plan, each with its reason or its measurement.
#include "plan.h"

namespace pyperc {

namespace {

// A parallel region costs 1.5 us and wakes another core, about the time of this much work on one.
constexpr double MIN_PARALLEL_FLOPS = 0.8e6;

// Fewer rows than this a thread leave the microkernel waiting for its own sums; sharing out columns is faster.
constexpr int64_t MIN_ROWS_PER_THREAD = 6;

// Activations of a chunk, in bytes: half of a second-level cache of 1 MB, the rest is the weights passing through.
constexpr int64_t CHUNK_BYTES = 512 * 1024;
constexpr int64_t MIN_CHUNK = 224, MAX_CHUNK = 384;

// From this width on dw outgrows the second-level cache: summed chunk by chunk it would pass through memory each time.
constexpr int64_t WIDE_BYTES = 3 * 1024;

// Rows further apart than this touch a page each, and the address translation becomes the limit.
constexpr int64_t MAX_STRIDE_IN_PLACE = 3 * 1024;
// Rows a multiple of this apart fall on the same sets of the first-level cache.
constexpr int64_t CACHE_SET_PERIOD = 4096;

}  // namespace

bool in_place(int64_t bytes) { return bytes <= MAX_STRIDE_IN_PLACE && (bytes % CACHE_SET_PERIOD != 0 || bytes == 0); }

int64_t padded(int64_t columns, size_t element) {
  const int64_t line = static_cast<int64_t>(64 / element);
  const int64_t whole = (columns + line - 1) / line * line;
  const int64_t bytes = whole * static_cast<int64_t>(element);
  return bytes >= 1024 && bytes % 1024 == 0 ? whole + line : whole;
}

Plan make_plan(Pass pass, const Tile& tile, size_t element, int64_t batch, const int64_t* sizes, int depth,
               int threads) {
  double flops = 0;
  int64_t widest = sizes[0];
  for (int l = 0; l < depth; ++l) {
    flops += 2.0 * static_cast<double>(batch) * static_cast<double>(sizes[l]) * static_cast<double>(sizes[l + 1]);
    widest = std::max(widest, sizes[l + 1]);
  }
  if (pass == Pass::Backward) flops *= 2;

  Plan plan;
  plan.threads = flops < MIN_PARALLEL_FLOPS ? 1 : threads;
  if (plan.threads > 1 && batch < plan.threads * MIN_ROWS_PER_THREAD) plan.split = Split::Columns;
  if (plan.split == Split::Columns || widest * static_cast<int64_t>(element) >= WIDE_BYTES) {
    plan.gradient = GradientSplit::Layers;
  } else if (plan.threads > 1 && batch < 2 * widest) {
    // The sums of the other threads would cost a pass over dw each; keeping ds costs a pass over the activations.
    plan.gradient = GradientSplit::Tiles;
  }

  const int64_t rows = plan.split == Split::Columns ? batch : (batch + plan.threads - 1) / plan.threads;
  const int64_t fitting = CHUNK_BYTES / std::max<int64_t>(1, widest * static_cast<int64_t>(element));
  const int64_t most = std::min(std::max(fitting, MIN_CHUNK), MAX_CHUNK) / tile.mr * tile.mr;
  const int64_t chunks = plan.split == Split::Columns ? 1 : std::max<int64_t>(1, (rows + most - 1) / most);
  plan.chunk = std::max<int64_t>(1, (rows + chunks - 1) / chunks);
  return plan;
}

}  // namespace pyperc
