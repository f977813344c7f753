// The plan of a pass, from the table of thresholds.
#include "plan.h"

#include "dispatch.h"
#include "pass.h"

namespace pyperc {

namespace {

struct Tables {
  Thresholds wide, narrow;
  Tables() {
#define X(name, wide_value, narrow_value) narrow.name = narrow_value;
    PYPERC_THRESHOLDS(X)
#undef X
  }
};
Tables& tables() {
  static Tables both;
  return both;
}

// What plain torch holds at once in a backward pass, beside x, y, dy and db, in elements. Forward kept x of each hidden
// layer, and s where f' is read from it. Then each layer makes dx and dw of ds and x, and the one below ds of dx.
int64_t held_by_torch(int64_t batch, bool wants_dx, const std::vector<LayerSpec>& layers) {
  const auto reads = [](const LayerSpec& layer, Saved what) { return saved_of(layer.activation) == what; };
  const auto has_ds = [](const LayerSpec& layer) { return layer.activation != Activation::Identity; };
  int64_t kept = 0, dw = 0, most = 0;
  for (size_t l = 0; l + 1 < layers.size(); ++l) {
    kept += batch * layers[l].out * (reads(layers[l], Saved::Summation) ? 2 : 1);
  }
  for (size_t l = layers.size(); l-- > 0;) {
    const LayerSpec& layer = layers[l];
    const int64_t ds = l + 1 < layers.size() || has_ds(layer) ? batch * layer.out : 0, x = batch * layer.in;
    dw += layer.in * layer.out;
    most = std::max(most, kept + ds + (l > 0 || wants_dx ? x : 0) + dw);
    if (l == 0) break;
    const LayerSpec& below = layers[l - 1];
    if (!reads(below, Saved::Output)) kept -= x;
    if (has_ds(below)) most = std::max(most, kept + x + x + dw);
    if (!reads(below, Saved::Nothing)) kept -= x;
  }
  return most;
}

}  // namespace

Thresholds& thresholds() {
  constexpr int WIDE = 64 / sizeof(float);
  return isa().f32.tile.width >= WIDE ? tables().wide : tables().narrow;
}
void reset_thresholds() { tables() = Tables(); }

GradientSplit gradient_split(const Plan& plan, const Tile& tile, size_t element, int64_t batch, bool wants_dx,
                             const std::vector<LayerSpec>& layers) {
  if (plan.gradient == GradientSplit::Layers) return plan.gradient;
  const auto size = static_cast<int64_t>(element);
  const LayerSpec& last = layers.back();
  int64_t hidden = 0, weights = 0, packed = 0, widest = 0;
  bool packs_x = false;  // or ds, for dw
  for (size_t l = 0; l < layers.size(); ++l) {
    const LayerSpec& layer = layers[l];
    weights += layer.in * layer.out;
    if (&layer != &last) {
      hidden += batch * kept_stride(layer.out, element);
      widest = std::max(widest, padded(layer.out, element));
    }
    if ((l > 0 || wants_dx) && !reads_in_place(plan.chunk, layer.out, layer.in * size)) {
      const int64_t panel = tile.vectors(plan.chunk) * tile.width;
      packed += (layer.in + panel - 1) / panel * panel * layer.out;
    }
    const bool has_x = l == 0 || saved_of(layers[l - 1].activation) != Saved::Summation;
    packs_x = packs_x || !has_x || !in_place(layer.in * size) || !in_place(padded(layer.out, element) * size);
  }
  // ds takes the place of x, but not the last one's, nor that which one thread alone makes before dw.
  const int64_t buffers = plan.alone && layers.size() > 1 ? 2 : 1;
  if (!plan.alone) widest = 0;
  if (last.activation != Activation::Identity) widest = std::max(widest, padded(last.out, element));
  const int64_t shared = packed + plan.threads * buffers * plan.chunk * widest + (plan.threads - 1) * weights;
  // In what the first thread keeps, beside x, packed, or beside little.
  const bool fits = shared * size <= static_cast<int64_t>(packs_x ? MOST_SHARED : THREAD_MEMORY / 8 * 7);
  // Alone it lets go of each layer when it has passed it, as plain torch does.
  const int64_t plain = held_by_torch(batch, wants_dx, layers);
  const int64_t all = hidden + weights + (wants_dx ? batch * layers[0].in : 0);
  const auto held = static_cast<double>((plan.alone ? plain : all) + (fits ? 0 : shared));
  const double percent = 100 * held / static_cast<double>(std::max<int64_t>(1, plain));
  return percent <= static_cast<double>(thresholds().peak_percent) ? GradientSplit::Rows : GradientSplit::Layers;
}

bool in_place(int64_t bytes) {
  // Rows a multiple of this apart fall on the same sets of the first-level cache.
  constexpr int64_t CACHE_SET_PERIOD = 4096;
  return bytes <= thresholds().in_place_bytes && (bytes % CACHE_SET_PERIOD != 0 || bytes == 0);
}

int64_t padded(int64_t columns, size_t element) {
  const int64_t line = static_cast<int64_t>(64 / element);
  if (columns < line) return columns;
  const int64_t whole = (columns + line - 1) / line * line;
  const int64_t bytes = whole * static_cast<int64_t>(element);
  return bytes >= 1024 && bytes % 1024 == 0 ? whole + line : whole;
}

int64_t kept_stride(int64_t columns, size_t element) {
  const auto line = static_cast<int64_t>(64 / element);
  const int64_t bytes = columns * static_cast<int64_t>(element), period = thresholds().pad_bytes;
  return period > 0 && bytes > 0 && bytes % period == 0 ? columns + line : columns;
}

Plan make_plan(Pass pass, const Tile& tile, size_t element, int64_t batch, const int64_t* sizes, int depth,
               int threads) {
  const auto bytes = [&](int64_t elements) { return elements * static_cast<int64_t>(element); };
  // A sum of fewer terms takes as long as one of so many: the time goes by what is written.
  constexpr int64_t LEAST_TERMS = 8;
  double flops = 0;
  int64_t widest = sizes[0], weights = 0, heaviest = 0, outputs = 0;
  for (int l = 0; l < depth; ++l) {
    weights += sizes[l] * sizes[l + 1];
    heaviest = std::max(heaviest, sizes[l] * sizes[l + 1]);
    outputs += batch * sizes[l + 1];
    const int64_t terms = sizes[l] > 0 ? std::max(sizes[l], LEAST_TERMS) : 0;
    flops += 2.0 * static_cast<double>(batch) * static_cast<double>(terms) * static_cast<double>(sizes[l + 1]);
    widest = std::max(widest, sizes[l + 1]);
  }
  if (pass == Pass::Backward) flops *= 2;

  const Thresholds& limits = thresholds();
  Plan plan;
  const double worth = flops / static_cast<double>(std::max<int64_t>(1, limits.parallel_flops));
  plan.threads = std::max(1, static_cast<int>(std::min<double>(threads, worth)));
  if (plan.threads > 1 && batch < plan.threads * limits.rows_per_thread) plan.split = Split::Columns;
  if (pass == Pass::Forward) {
    // What threads hand over costs: of rows, the weights that each packs a part of and all read; of columns, the x that
    // passes between layers. Without packing, rows hand over nothing.
    const int64_t between = outputs - batch * sizes[depth];
    const bool dots = batch > limits.dot_rows && batch <= plan.threads * limits.dot_rows;
    if (plan.threads > 1) {
      if (2 * between <= weights && bytes(batch * widest) <= limits.columns_bytes) plan.split = Split::Columns;
      if (dots) plan.split = Split::Rows;
    }
    // A weight that is packed whole is read again from memory, and held beside activations that may weigh less.
    if (bytes(heaviest) >= limits.weight_bytes && 3 * heaviest >= batch * widest) plan.split = Split::Columns;
  }
  const int64_t layer = bytes(batch * widest);
  plan.packed_bytes = limits.packed_bytes + layer;
  plan.rows_at_once = std::max<int64_t>(1, limits.rows_at_once);
  // Beside the kept activations of a step; forward, which does without sums of dw, has more room.
  const int64_t share = layer / ((pass == Pass::Forward ? 2 : 8) * plan.threads);
  plan.block_bytes = std::clamp(share, limits.block_bytes / 2, std::max(limits.block_bytes, share / 4));
  // A dw for each thread is worth it where adding them up is little beside the products; one thread alone adds none up.
  const bool is_small = plan.threads == 1 && bytes(outputs) <= limits.packed_bytes;
  const bool own_dw = batch >= plan.threads * std::max<int64_t>(1, limits.gradient_rows) || is_small;
  // In 16 bits it would take float32.
  const bool by_rows = element >= sizeof(float) && plan.split == Split::Rows && bytes(widest) < limits.wide_bytes;
  plan.gradient = by_rows && own_dw ? GradientSplit::Rows : GradientSplit::Layers;

  const int64_t rows = plan.split == Split::Columns ? batch : (batch + plan.threads - 1) / plan.threads;
  const int64_t fitting = limits.chunk_bytes / std::max<int64_t>(1, bytes(widest));
  const int64_t most = std::min(std::max(fitting, limits.least_chunk), limits.most_chunk);
  const int64_t whole_tiles = std::max<int64_t>(1, most / tile.mr * tile.mr);
  const int64_t chunks = std::max<int64_t>(1, (rows + whole_tiles - 1) / whole_tiles);
  plan.chunk = std::max<int64_t>(1, (rows + chunks - 1) / chunks);
  plan.alone = plan.threads == 1 && batch <= plan.chunk;
  return plan;
}

}  // namespace pyperc
