// How a network of a given shape runs: threads, how they share the work, blocking, packing. The thresholds are in
// plan.cpp.
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels.h"

namespace pyperc {

// Rows: each thread takes rows of the batch through all layers, without a barrier.
// Columns: each layer's columns are shared out; for batches too short to split.
enum class Split { Rows, Columns };

// How dw and the chain of dx share a backward pass:
// Rows: each thread sums dw over its own rows while they are in the cache; the sums are added in the order of the
// threads. Tiles: the chain first, keeping ds of all layers; then dw's columns (or rows) are shared out. Layers: layer
// by layer, dw's columns and then the rows (or columns) of dx are shared out, keeping ds of two layers.
enum class GradientSplit { Rows, Tiles, Layers };

struct Plan {
  int threads = 1;
  Split split = Split::Rows;
  GradientSplit gradient = GradientSplit::Rows;
  int64_t chunk = 1;  // rows that go through all layers together, so that their activations stay in the cache
};

enum class Pass { Forward, Backward };

// `in` and `out` of the layers are given by sizes[0 ... depth].
Plan make_plan(Pass pass, const Tile& tile, size_t element, int64_t batch, const int64_t* sizes, int depth,
               int threads);

// Whether a matrix whose rows lie `bytes` apart is read in place rather than packed.
bool in_place(int64_t bytes);

// A row stride for a buffer of our own, so that its rows do not fall on the same cache sets.
int64_t padded(int64_t columns, size_t element);

}  // namespace pyperc
