// How a network of a given shape runs: threads, how they share the work, blocking, packing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "kernels.h"

namespace pyperc {

// Rows: each thread takes rows of the batch through all layers, without a barrier; weights are packed before.
// Columns: each layer's columns are shared out, and a thread packs as many of its own as stay in its cache, uses them,
// and packs the next. For batches too short to split, and for weights too heavy to be packed at once.
enum class Split { Rows, Columns };

// How dw and the chain of dx share a backward pass:
// Rows: each thread sums dw over its own rows while they are in the cache; the sums are added in the order of the
// threads. Layers: layer by layer, the columns of dw and dx are shared out, so that one layer's ds, packed weight and
// dw are in use at a time.
enum class GradientSplit { Rows, Layers };

struct Plan {
  int threads = 1;
  Split split = Split::Rows;
  GradientSplit gradient = GradientSplit::Rows;
  int64_t chunk = 1;         // rows that go through all layers together, so that their activations stay in the cache
  int64_t packed_bytes = 0;  // of weights that a forward pass packs at once: of as many layers as fit, but of one
  int64_t rows_at_once = 0;  // at least, of a forward pass whose hidden x waits in buffers
  int64_t block_bytes = 0;   // of a thread's columns that it packs at once, where it packs its own
  bool alone = false;        // one thread takes the whole batch through all layers at once
};

enum class Pass { Forward, Backward };

// The table of thresholds: name, value with vectors of 64 bytes, value with shorter ones, which are those of processors
// with smaller caches; reason or measurement (Zen 5, two cores, float32; of the shorter ones Zen 3).
//
// parallel_flops     work per thread below which another thread is not woken: a parallel region costs 1.5 us, and
//                    several times that while the cores have no cache in common: there 16 x [128]*4 goes forward in
//                    14 us by one thread and in 27 by two, and 32 x [64]*4 takes a step in 14 us and in 30.
// columns_bytes      activations of a batch up to which a forward pass shares out columns if the weights are twice what
//                    passes between layers: 32 x 256 -> 256 takes 14 us against 17 by rows, and 21 against 40 while the
//                    cores have no cache in common, as no thread writes what another has read.
// rows_per_thread    fewer leave the microkernel waiting for its own sums, so that columns are shared out instead.
// gradient_rows      rows per thread from which each thread sums a dw of its own; fewer do not pay for adding them up.
// chunk_bytes        activations of a chunk of rows: half of a second-level cache of 1 MB; the rest is passing weights.
// weight_bytes       of a layer from which its weight is packed by blocks of columns, if it weighs a third of the
//                    activations or more: 32 x 4096 -> 4096 takes 6 ms against 28, as it is read from memory once and
//                    not written there; 256 x [512]*5 takes 1.33 ms against 1.49.
// block_bytes        of packed columns, for each thread, and down to half of that beside few activations: 1024 x
//                    [1024]*4 goes forward in 15.9 ms with 1 MB, 16.0 with 512 KB and 16.2 with 256. Beside very many
//                    it is more, as they are read from memory for each block: 4096 cubed runs at 88% of the peak with
//                    4 MB, at 87% with 2 or 8 MB and at 74% with 512 KB.
// product_bytes      the same of a backward product, at most, where there is room for more: dx of 4096 cubed runs at
//                    86% of the peak with 4 or 8 MB, at 84% with 2 or 16 MB.
// scratch_bytes      of x and ds that a thread packs at once for dw, where it packs both: what each thread keeps, as
//                    all at once would hold more than plain torch and take no less time: as long as with 1 MB for
//                    squares of 512 and 1024 (Zen 3), 1.1 times for 2048 and 4096.
// least_chunk        rows: 2048 cubed runs at 226 GF/s a core with 224, at 213 with 112, as weights stream per chunk.
// most_chunk         rows: more only lengthen the way from one layer to the next.
// rows_at_once       of a batch, at least, that go through all layers before the next, where hidden x that nobody keeps
//                    would wait for the others: each block packs the weights again. 4096 x [2048]*5 holds 68 MB for
//                    100, and takes 0.98 of the time (Zen 3).
// wide_bytes         bytes of a row from which dw outgrows the second-level cache: the backward pass goes by layers.
// in_place_bytes     rows further apart touch a page each; packed, they do not. In 32 KB of a first-level cache they
//                    collide sooner: dw of 256 samples and columns runs at 74% of the peak in place, at 82% packed, of
//                    128 at 75% and 73%.
// dot_rows           up to so many rows the weight is read along its rows, without packing: 1.3 us against 1.8 at 4.
// dot_most           the same of rows, or columns, whose sums have dot_terms terms for each of them.
// dot_terms          adding up the lanes takes as long as some terms do: 16 x 1024 -> 1024 takes 102 us against 132
//                    packed, 32 takes 196 against 200; of width 256 they meet at 16 rows, of 512 at 24.
// few_rows           up to so many rows a pass over the other operand to pack it does not pay.
// pad_bytes          hidden rows of a multiple of this have a line more between them, as they fall on the same sets of
//                    a cache, where a product reads 14 of them at once, or down its columns in place; 0: none has. With
//                    in_place_bytes of the wide column, 1024 x [512]*3 forward and backward takes 1.07 times as long
//                    without, with that of the narrow one as long (Zen 3); of widths from 33 to 300 none gains.
// peak_percent       of plain torch's peak that a backward pass may hold where threads sum a dw of their own.
// packed_bytes       of weights packed at once, beyond a layer's activations and at least one layer's: 128 x [128]*5
//                    goes forward in two pieces and stays at plain torch's peak. Of outputs, up to which one thread
//                    alone sums dw by rows, however few.
#define PYPERC_THRESHOLDS(X)               \
  X(parallel_flops, 800000, 800000)        \
  X(columns_bytes, 1 << 20, 1 << 20)       \
  X(rows_per_thread, 6, 6)                 \
  X(gradient_rows, 128, 128)               \
  X(chunk_bytes, 512 * 1024, 512 * 1024)   \
  X(weight_bytes, 1 << 20, 1 << 20)        \
  X(block_bytes, 512 * 1024, 256 * 1024)   \
  X(product_bytes, 4 << 20, 4 << 20)       \
  X(scratch_bytes, 496 * 1024, 496 * 1024) \
  X(least_chunk, 224, 224)                 \
  X(most_chunk, 384, 384)                  \
  X(rows_at_once, 2048, 2048)              \
  X(wide_bytes, 3 * 1024, 3 * 1024)        \
  X(in_place_bytes, 3 * 1024, 512)         \
  X(dot_rows, 4, 4)                        \
  X(dot_most, 24, 24)                      \
  X(dot_terms, 16, 16)                     \
  X(few_rows, 8, 8)                        \
  X(pad_bytes, 1024, 0)                    \
  X(peak_percent, 100, 100)                \
  X(packed_bytes, 64 * 1024, 64 * 1024)

struct Thresholds {
#define X(name, wide, narrow) int64_t name = wide;
  PYPERC_THRESHOLDS(X)
#undef X
};

// Those in force with the ISA in use. Tests change them to force a path, tuning to measure one; not while a pass is
// running.
Thresholds& thresholds();
// All of them as they stand in the table.
void reset_thresholds();

// `in` and `out` of the layers are given by sizes[0 ... depth].
Plan make_plan(Pass pass, const Tile& tile, size_t element, int64_t batch, const int64_t* sizes, int depth,
               int threads);

// How a backward pass over these layers goes by its plan: as the plan says where that holds no more at once than plain
// torch would, and is within reach of what each thread keeps.
GradientSplit gradient_split(const Plan& plan, const Tile& tile, size_t element, int64_t batch, bool wants_dx,
                             const std::vector<LayerSpec>& layers);

// Whether a matrix whose rows lie `bytes` apart is read in place rather than packed.
bool in_place(int64_t bytes);
// Whether the right-hand side [k, n] of a product with m rows is, whose rows are contiguous and lie so far apart.
inline bool reads_in_place(int64_t m, int64_t k, int64_t bytes) {
  return std::min(m, k) <= thresholds().few_rows || in_place(bytes);
}

// A row stride for a buffer of our own, so that its rows do not fall on the same cache sets.
int64_t padded(int64_t columns, size_t element);
// The same for what a forward pass keeps of a hidden layer, where a line more in each row weighs.
int64_t kept_stride(int64_t columns, size_t element);

}  // namespace pyperc
