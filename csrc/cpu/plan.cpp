// The plan of a pass, from the table of thresholds.
#include "plan.h"

namespace pyperc {

Thresholds& thresholds() {
  static Thresholds table;
  return table;
}

bool in_place(int64_t bytes) {
  // Rows a multiple of this apart fall on the same sets of the first-level cache.
  constexpr int64_t CACHE_SET_PERIOD = 4096;
  return bytes <= thresholds().in_place_bytes && (bytes % CACHE_SET_PERIOD != 0 || bytes == 0);
}

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

  const Thresholds& limits = thresholds();
  Plan plan;
  const double worth = flops / static_cast<double>(std::max<int64_t>(1, limits.parallel_flops));
  plan.threads = std::max(1, static_cast<int>(std::min<double>(threads, worth)));
  if (plan.threads > 1 && batch < plan.threads * limits.rows_per_thread) plan.split = Split::Columns;
  if (plan.split == Split::Columns || widest * static_cast<int64_t>(element) >= limits.wide_bytes) {
    plan.gradient = GradientSplit::Layers;
  } else if (plan.threads > 1 && batch < std::max(2 * widest, plan.threads * limits.gradient_rows)) {
    // The sums of the other threads would cost a pass over dw each; keeping ds costs a pass over the activations.
    plan.gradient = GradientSplit::Tiles;
  }

  const int64_t rows = plan.split == Split::Columns ? batch : (batch + plan.threads - 1) / plan.threads;
  const int64_t fitting = limits.chunk_bytes / std::max<int64_t>(1, widest * static_cast<int64_t>(element));
  const int64_t most = std::min(std::max(fitting, limits.least_chunk), limits.most_chunk);
  const int64_t whole_tiles = std::max<int64_t>(1, most / tile.mr * tile.mr);
  const int64_t chunks =
      plan.split == Split::Columns ? 1 : std::max<int64_t>(1, (rows + whole_tiles - 1) / whole_tiles);
  plan.chunk = std::max<int64_t>(1, (rows + chunks - 1) / chunks);
  return plan;
}

}  // namespace pyperc
