// The CPU's backend.
#include "backend.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "../cpu/dispatch.h"
#include "../cpu/mlp.h"
#include "memory.h"
#include "threads.h"

namespace pyperc::native {

namespace {

Tensor in_large_pages(Tensor t) {
  if (t.nbytes() >= MOST_KEPT) prefer_large_pages(t.mutable_data_ptr(), t.nbytes());
  return t;
}

Tensor empty(c10::IntArrayRef sizes, at::ScalarType dtype) {
  return in_large_pages(at::detail::empty_cpu(sizes, dtype));
}

// A [rows, columns] buffer of our own.
Tensor empty_rows(int64_t rows, int64_t columns, at::ScalarType dtype) {
  const int64_t ld = kept_stride(columns, c10::elementSize(dtype));
  const int64_t sizes[] = {rows, columns}, strides[] = {ld, 1};
  return in_large_pages(at::detail::empty_strided_cpu(sizes, strides, dtype));
}

// The kernels have types of their own for what torch stores in 16 bits, so torch is not asked to check them.
template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// A tensor as rows of its last dimension, without a copy where the strides of the leading dimensions allow it; `owner`
// keeps a copy alive. A dimension of size one has an arbitrary stride, which is passed over.
template <class T>
Matrix<T> rows_of(const Tensor& t, Tensor& owner) {
  owner = t;
  const int64_t last = t.dim() - 1;
  int64_t rs = t.size(last), next = -1;
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (next < 0) {
      rs = t.stride(d);
    } else if (t.stride(d) != next) {
      owner = t.contiguous();
      return {data_of<T>(owner), owner.size(last), 1};
    }
    next = t.stride(d) * t.size(d);
  }
  return {data_of<T>(t), rs, t.stride(last)};
}

// A dimension of size one has an arbitrary stride: give it the one that the kernels like.
template <class T>
Matrix<T> settled(Matrix<T> m, int64_t rows, int64_t columns) {
  if (columns == 1) m.cs = 1;
  if (rows == 1) m.rs = columns;
  return m;
}

// Whether nobody else can read this tensor, so that its memory may be written over.
bool is_sole_owner(const Tensor& t) { return t.use_count() == 1 && t.storage().use_count() == 1; }

size_t bytes_of(const Tensors& tensors) {
  size_t bytes = 0;
  for (const Tensor& t : tensors) bytes += t.defined() ? t.nbytes() : 0;
  return bytes;
}

int64_t batch_of(c10::IntArrayRef sizes) {
  int64_t batch = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) batch *= sizes[d];
  return batch;
}

std::vector<int64_t> sizes_of(const Tensors& weights) {
  std::vector<int64_t> sizes{weights[0].size(1)};
  for (const Tensor& w : weights) sizes.push_back(w.size(0));
  return sizes;
}

LayerSpec spec_of(c10::IntArrayRef sizes, const Chain& chain, size_t l) {
  return {sizes[l], sizes[l + 1], chain[l].activation, chain[l].parameters};
}

template <class T>
Matrix<const T> weight_of(const Tensor& w) {
  return settled<const T>({data_of<const T>(w), w.stride(0), w.stride(1)}, w.size(0), w.size(1));
}

template <class T>
Plan plan_of(Pass pass, int64_t batch, c10::IntArrayRef sizes) {
  return make_plan(pass, isa().kernels(T{}).tile, sizeof(T), batch, sizes.data(), static_cast<int>(sizes.size()) - 1,
                   torch_threads().threads);
}

template <class T>
void run_forward(const Tensor& x, const Network& network, int64_t batch, const Tensors& outputs, const Tensors& s) {
  const size_t depth = network.depth();
  const auto& kernels = isa().kernels(T{});
  std::vector<ForwardLayer<T>> layers(depth);
  const std::vector<int64_t> sizes = sizes_of(network.weights);
  Tensors owners(depth + 1);
  for (size_t l = 0; l < depth; ++l) {
    ForwardLayer<T>& layer = layers[l];
    layer.spec = spec_of(sizes, network.chain, l);
    layer.w = weight_of<T>(network.weights[l]);
    if (network.biases[l].defined()) {
      owners[l] = contiguous_bias(network.biases[l]);
      layer.b = data_of<const T>(owners[l]);
    }
    if (outputs[l].defined()) {
      layer.x = {data_of<T>(outputs[l]), l + 1 == depth ? layer.spec.out : outputs[l].stride(0), 1};
    }
    if (s[l].defined()) layer.s = {data_of<T>(s[l]), s[l].stride(0), 1};
  }
  const Forward<T> pass{batch, settled<const T>(rows_of<const T>(x, owners[depth]), batch, layers[0].spec.in),
                        layers.data(), static_cast<int>(depth)};
  TorchMemory memory;
  pyperc::forward(kernels, plan_of<T>(Pass::Forward, batch, sizes), pass, torch_threads(), memory);
}

// What a backward pass works on. It makes dw and dx when they are about to be written, and lets go of what was kept of
// a layer when nobody reads it again.
template <class T>
struct BackwardMemory final : TorchMemory {
  Kept kept;
  Tensors gradients;
  std::vector<BackwardLayer<T>> layers;
  Backward<T> pass;
  c10::DimVector dx_sizes;
  at::ScalarType dtype;

  void begin(int l) override {
    BackwardLayer<T>& layer = layers[l];
    Tensor& dw = gradients[1 + l];
    dw = empty({layer.spec.out, layer.spec.in}, dtype);
    layer.dw = data_of<T>(dw);
  }
  void begin_dx() override {
    gradients[0] = empty(dx_sizes, dtype);
    pass.dx = {data_of<T>(gradients[0]), layers[0].spec.in, 1};
  }
  void end(int l) override { kept.x[l] = kept.s[l] = Tensor(); }
};

template <class T>
Tensors run_backward(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights, Kept&& kept,
                     Release release, const Chain& chain, const Needs& needs) {
  const size_t depth = weights.size();
  const int64_t batch = batch_of(dy.sizes());
  const auto& kernels = isa().kernels(T{});
  BackwardMemory<T> memory;
  int64_t made = needs.x ? batch * sizes[0] : 0;
  for (size_t l = 0; l < depth; ++l) made += needs.weights[l] ? sizes[l] * sizes[l + 1] : 0;
  expect_to_come_again(bytes_of(kept.x) + bytes_of(kept.s) + static_cast<size_t>(made) * sizeof(T));
  memory.kept = std::move(kept);
  memory.gradients.resize(1 + 2 * depth);
  memory.layers.resize(depth);
  memory.dtype = dy.scalar_type();
  Tensors owners;
  owners.reserve(2 * depth + 2);
  // A saved tensor as rows; one that hooks have brought back may have any strides, the kernels want unit column stride.
  const auto rows = [&](const Tensor& t, int64_t columns) -> Matrix<const T> {
    if (!t.defined()) return {};
    Tensor owner;
    Matrix<const T> m = settled(rows_of<const T>(t, owner), batch, columns);
    if (m.cs != 1) {
      owner = t.contiguous();
      m = {data_of<const T>(owner), columns, 1};
    }
    if (!owner.is_same(t)) owners.push_back(std::move(owner));
    return m;
  };
  for (size_t l = 0; l < depth; ++l) {
    BackwardLayer<T>& layer = memory.layers[l];
    layer.spec = spec_of(sizes, chain, l);
    if (weights[l].defined()) layer.w = weight_of<T>(weights[l]);
    const Tensor &output = memory.kept.x[l], &summation = memory.kept.s[l];
    const Matrix<const T> own_x = rows(output, layer.spec.out), own_s = rows(summation, layer.spec.out);
    if (l + 1 < depth) memory.layers[l + 1].x = own_x;
    if (chain[l].saved() == Saved::Summation) layer.saved = own_s;
    if (chain[l].saved() == Saved::Output) layer.saved = own_x;
    // The network's output is not ours.
    if (release == Release::Kept) {
      if (summation.defined() && is_sole_owner(summation)) {
        layer.ds = {const_cast<T*>(own_s.data), own_s.rs, 1};
      } else if (l + 1 < depth && output.defined() && is_sole_owner(output)) {
        layer.ds = {const_cast<T*>(own_x.data), own_x.rs, 1};
      }
    }
    layer.wants_dw = needs.weights[l];
    if (needs.biases[l]) {
      Tensor& db = memory.gradients[1 + depth + l];
      db = empty({sizes[l + 1]}, memory.dtype);
      layer.db = data_of<T>(db);
    }
  }
  if (needs.weights[0]) {
    owners.emplace_back();
    memory.layers[0].x = settled(rows_of<const T>(x, owners.back()), batch, sizes[0]);
  }
  owners.emplace_back();
  memory.pass = {batch,
                 settled(rows_of<const T>(dy, owners.back()), batch, sizes[depth]),
                 needs.x,
                 {},
                 memory.layers.data(),
                 static_cast<int>(depth)};
  memory.dx_sizes.assign(dy.sizes().begin(), dy.sizes().end());
  memory.dx_sizes.back() = sizes[0];
  pyperc::backward(kernels, plan_of<T>(Pass::Backward, batch, sizes), memory.pass, torch_threads(), memory);
  return std::move(memory.gradients);
}

Tensor forward_on_cpu(const Tensor& x, const Network& network, Kept* kept) {
  const size_t depth = network.depth();
  const int64_t batch = batch_of(x.sizes());
  const at::ScalarType dtype = x.scalar_type();
  Tensors outputs(depth), s(depth);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = network.weights.back().size(0);
  outputs[depth - 1] = empty(sizes, dtype);
  if (kept) {
    for (size_t l = 0; l < depth; ++l) {
      const int64_t out = network.weights[l].size(0);
      if (l + 1 < depth && composition::keeps_output(network.chain, l)) outputs[l] = empty_rows(batch, out, dtype);
      if (network.chain[l].saved() == Saved::Summation) s[l] = empty_rows(batch, out, dtype);
    }
  }
  expect_to_come_again(bytes_of(outputs) + bytes_of(s));
  visit(dtype, [&](auto zero) { run_forward<decltype(zero)>(x, network, batch, outputs, s); });
  Tensor output = outputs.back();
  if (kept) *kept = {std::move(outputs), std::move(s)};
  return output;
}

Tensors backward_on_cpu(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights, Kept kept,
                        Release release, const Chain& chain, const Needs& needs) {
  Tensors gradients;
  visit(dy.scalar_type(), [&](auto zero) {
    gradients = run_backward<decltype(zero)>(dy, x, sizes, weights, std::move(kept), release, chain, needs);
  });
  return gradients;
}

template <class T>
void apply(const Kernels<T>& kernels, int64_t n, const T* in, T* out, const LayerActivation& layer) {
  kernels.activate[static_cast<int>(layer.activation)]({1, n, in, 0, out, 0, nullptr, 0, nullptr, layer.parameters});
}

// In float32, a piece at a time, and rounded once.
template <class S>
void apply(const HalfKernels<S>& kernels, int64_t n, const S* in, S* out, const LayerActivation& layer) {
  constexpr int64_t PIECE = 1024;
  float wide[PIECE];
  for (int64_t i = 0; i < n; i += PIECE) {
    const int64_t count = std::min(PIECE, n - i);
    kernels.widen(1, count, in + i, 0, wide, 0);
    kernels.activate[static_cast<int>(layer.activation)](
        {1, count, wide, 0, wide, 0, nullptr, 0, nullptr, layer.parameters});
    kernels.narrow(1, count, wide, 0, out + i, 0);
  }
}

Tensor activation_on_cpu(const Tensor& s, const LayerActivation& layer) {
  const Tensor in = s.contiguous();
  const Tensor out = empty(in.sizes(), in.scalar_type());
  visit(s.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    apply(isa().kernels(zero), in.numel(), data_of<const T>(in), data_of<T>(out), layer);
  });
  return out;
}

// What the products of a dtype multiply, where that is not the dtype itself, and a cache block's terms of the sum.
template <class T>
std::string operands_of(const Kernels<T>&, at::ScalarType) {
  return "";
}
template <class S>
std::string operands_of(const HalfKernels<S>& kernels, at::ScalarType dtype) {
  const std::string name(c10::getDtypeNames(dtype).first);
  return kernels.paired.gemm ? " (" + name + " pairs)" : " (" + name + " widened to float32)";
}
template <class T>
int64_t block_of(const Kernels<T>& kernels) {
  return kernels.kc;
}
template <class S>
int64_t block_of(const HalfKernels<S>& kernels) {
  return kernels.paired.gemm ? 2 * kernels.paired.kc : kernels.widened.kc;
}

// Whether a weight, as the right-hand side of a forward product, is read in place.
template <class T>
bool in_place(const Kernels<T>&, int64_t rows, int64_t in, Matrix<const T> w) {
  return reads_in_place<T>(rows, in, {w.data, w.cs, w.rs});
}
template <class S>
bool in_place(const HalfKernels<S>&, int64_t, int64_t, Matrix<const S>) {
  return false;
}

const char* name_of(GradientSplit split) {
  switch (split) {
    case GradientSplit::Rows: return "rows";
    case GradientSplit::Layers: return "layers";
  }
  return "";
}

template <class T>
NetworkPlan report_of(const Tensor& x, const Network& network) {
  const auto& kernels = isa().kernels(T{});
  const int64_t batch = batch_of(x.sizes());
  const std::vector<int64_t> sizes = sizes_of(network.weights);
  const Plan plan = plan_of<T>(Pass::Forward, batch, sizes), back = plan_of<T>(Pass::Backward, batch, sizes);
  std::vector<LayerSpec> specs;
  for (size_t l = 0; l < network.depth(); ++l) specs.push_back(spec_of(sizes, network.chain, l));
  const GradientSplit split = gradient_split(back, kernels.tile, sizeof(T), batch, x.requires_grad(), specs);
  constexpr bool HALF = !std::is_floating_point_v<T>;
  int64_t bytes = 0;
  for (const Tensor& w : network.weights) bytes += w.numel() * static_cast<int64_t>(sizeof(T));
  // Hidden x waits where columns are shared, or weights are packed in several pieces.
  const bool waits = plan.split == Split::Columns || bytes > std::max(plan.packed_bytes, thresholds().chunk_bytes);
  const int64_t blocks = network.depth() > 1 && waits ? batch / plan.rows_at_once : 1;
  NetworkPlan report{isa().name, plan.threads, {}, {back.threads, name_of(split), HALF ? 0 : back.chunk}};
  for (size_t l = 0; l < network.depth(); ++l) {
    const Matrix<const T> w = weight_of<T>(network.weights[l]);
    LayerPlan layer{};
    layer.in = sizes[l];
    layer.out = sizes[l + 1];
    layer.activation = network.chain[l].info().name;
    layer.saved = network.chain[l].saved();
    if (reads_rows(plan, spec_of(sizes, network.chain, l), w)) {
      layer.kernel = "dot";
      layer.tile = std::to_string(plan.chunk) + "x" + std::to_string(kernels.tile.width);
      layer.pack = "weight read along its rows";
    } else {
      const int vectors = kernels.tile.vectors(plan.chunk);
      layer.kernel = "gemm";
      layer.tile = std::to_string(kernels.tile.rows(vectors)) + "x" + std::to_string(vectors * kernels.tile.width);
      layer.pack =
          in_place(kernels, plan.chunk, layer.in, w) ? "weight read in place" : "weight transposed into panels";
      if (plan.split == Split::Columns) layer.pack += ", some columns at a time";
    }
    layer.kernel += operands_of(kernels, x.scalar_type());
    layer.blocking = (HALF ? "rows up to " : "rows ") + std::to_string(plan.chunk) + ", k " +
                     std::to_string(std::min(layer.in, block_of(kernels)));
    if (plan.threads > 1) {
      layer.blocking += plan.split == Split::Rows ? ", threads share rows" : ", threads share columns";
    }
    if (blocks > 1) layer.blocking += ", up to " + std::to_string(blocks) + " blocks of the batch where no x is kept";
    layer.flops = 2 * batch * layer.in * layer.out;
    report.layers.push_back(layer);
  }
  return report;
}

NetworkPlan plan_on_cpu(const Tensor& x, const Network& network) {
  NetworkPlan report;
  visit(x.scalar_type(), [&](auto zero) { report = report_of<decltype(zero)>(x, network); });
  return report;
}

std::vector<Threshold> cpu_thresholds() {
  Thresholds& table = thresholds();
#define X(name, wide, narrow) {#name, &table.name},
  return {PYPERC_THRESHOLDS(X)};
#undef X
}

const bool added =
    add_backend(c10::DeviceType::CPU, {forward_on_cpu, backward_on_cpu, activation_on_cpu, plan_on_cpu,
                                       [](c10::Device) -> const char* { return nullptr; }, cpu_thresholds});

}  // namespace

double flops(const Tensor& x, const Tensors& weights) {
  double sum = 0;
  for (const Tensor& w : weights) sum += 2.0 * static_cast<double>(w.numel());
  return sum * static_cast<double>(batch_of(x.sizes()));
}

double probe(double seconds) {
  const Parallel parallel = torch_threads();
  std::vector<double> rates(static_cast<size_t>(parallel.threads));
  struct Context {
    double seconds;
    double* rates;
    const Isa* isa;
  } context{seconds, rates.data(), &isa()};
  parallel.run(
      parallel.threads,
      [](void* c, int64_t i) {
        const auto* context = static_cast<Context*>(c);
        context->rates[i] = context->isa->probe(context->seconds);
      },
      &context);
  double sum = 0;
  for (const double rate : rates) sum += rate;
  return sum / 1e9;
}

}  // namespace pyperc::native
