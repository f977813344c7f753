// The CUDA backend: the loops over the layers. Everything goes to the current stream of the tensors' device, memory
// comes from torch alone, and nothing waits for the device, so that a CUDA graph can record it.
#include <ATen/Context.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "../../cuda/device.h"
#include "../../cuda/elementwise.h"
#include "../../cuda/gemm.h"
#include "../../cuda/narrow_mlp.h"
#include "../../cuda/plan.h"
#include "../backend.h"

namespace pyperc::native {

namespace {

// What every entry sets first: the tensors' device, and no autograd below here.
class Call {
 public:
  explicit Call(c10::Device device) : guard_(device), device_(device) {
    if (device.is_cuda()) check(cuda::make_current(device.index()), "make_current");
  }
  cuda::Stream stream() const {
    if (!device_.is_cuda()) return nullptr;  // the tests' emulator
    return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  }
  void check(cuda::Status status, const char* what) const {
    TORCH_CHECK(status == cuda::SUCCESS, "pyperc: ", what, " on ", device_, ": ", cuda::describe(status));
  }

 private:
  const c10::DeviceGuard guard_;
  const at::AutoDispatchBelowADInplaceOrView below_autograd_;
  const c10::Device device_;
};

// [rows, columns], each row at a multiple of 16 bytes, as the kernels like it best.
Tensor empty_rows(int64_t rows, int64_t columns, const Tensor& like) {
  const int64_t step = std::max<int64_t>(1, 16 / like.element_size()), pitch = (columns + step - 1) / step * step;
  return at::empty_strided({rows, columns}, {pitch, 1}, like.options());
}

int64_t batch_of(const Tensor& t) {
  int64_t batch = 1;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) batch *= t.size(d);
  return batch;
}
// A tensor as the rows of its last dimension; elements of a row are neighbours.
Tensor rows_of(const Tensor& t) {
  const Tensor rows = t.dim() == 2 ? t : t.reshape({batch_of(t), t.size(-1)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}
Tensor shaped_like(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return at::empty(sizes, t.options());
}

// What stands in the kernels' structs; null and 0 of an undefined tensor. The kernels have types of their own for what
// torch stores in 16 bits, so torch is not asked to check them.
template <class T>
T* data_of(const Tensor& t) {
  return t.defined() ? static_cast<T*>(const_cast<void*>(t.const_data_ptr())) : nullptr;
}
int64_t pitch_of(const Tensor& rows) { return rows.defined() ? rows.stride(0) : 0; }
template <class T>
Matrix<const T> matrix_of(const Tensor& t) {
  return {data_of<const T>(t), t.stride(0), t.stride(1)};
}

// Memory for one call. It may be given to another as soon as the launch is made: the stream keeps their order.
struct Workspace {
  Tensor memory;
  Workspace(size_t bytes, const Tensor& like) {
    if (bytes) memory = at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
  }
  void* data() const { return data_of<void>(memory); }
};

bool may_round(const Tensor& t) {
  if (t.scalar_type() != at::kFloat) return false;
  const auto precision = at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL);
  return precision == at::Float32Precision::TF32;
}

cuda::LayerShape shape_of(const Tensor& x, int64_t in, int64_t out) {
  return {static_cast<int>(x.element_size()), may_round(x), in, out};
}

// c = a b, with what `finish` adds to it.
template <class F>
void gemm(const Call& call, const Tensor& a, const Tensor& b, const Tensor& c, F finish) {
  visit(a.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    cuda::Gemm<T> g{a.size(0), b.size(1), a.size(1), matrix_of<T>(a), matrix_of<T>(b), data_of<T>(c), pitch_of(c)};
    g.tf32 = may_round(a);
    finish(g);
    const Workspace workspace(cuda::gemm_workspace(g), a);
    g.workspace = workspace.data();
    call.check(cuda::gemm(g, call.stream()), "gemm");
  });
}

// x = f(s), for rows.
void activate(const Call& call, const Tensor& s, const Tensor& x, const LayerActivation& layer) {
  visit(s.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const cuda::Activate<T> pass{s.size(0),     s.size(1),   data_of<T>(s),    pitch_of(s),
                                 data_of<T>(x), pitch_of(x), layer.activation, layer.parameters};
    call.check(cuda::activate(pass, call.stream()), "activate");
  });
}

// ds = dx * f'(saved) and db, each where defined; and x = f(saved), where that is defined.
void differentiate(const Call& call, const Tensor& dx, const Tensor& saved, const Tensor& ds, const Tensor& db,
                   const Tensor& x, const LayerActivation& layer) {
  visit(dx.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Workspace workspace(db.defined() ? cuda::differentiate_workspace<T>(dx.size(0), dx.size(1)) : 0, dx);
    cuda::Differentiate<T> pass{};
    pass.rows = dx.size(0);
    pass.columns = dx.size(1);
    pass.dx = data_of<T>(dx);
    pass.ld_dx = pitch_of(dx);
    pass.saved = data_of<T>(saved);
    pass.ld_saved = pitch_of(saved);
    pass.ds = data_of<T>(ds);
    pass.ld_ds = pitch_of(ds);
    pass.x = data_of<T>(x);
    pass.ld_x = pitch_of(x);
    pass.db = data_of<T>(db);
    pass.workspace = workspace.data();
    pass.activation = layer.activation;
    pass.parameters = layer.parameters;
    call.check(cuda::differentiate(pass, call.stream()), "differentiate");
  });
}

// s = in w^T + b, x = f(s); s and b may be undefined.
void forward_layer(const Call& call, const Tensor& in, const Tensor& w, const Tensor& b, Tensor s, Tensor x,
                   const LayerActivation& layer) {
  if (cuda::plan(shape_of(in, w.size(1), w.size(0)), cuda::Follows::Something) == cuda::Path::Gemm) {
    gemm(call, in, w.t(), x, [&](auto& g) {
      using T = std::remove_pointer_t<decltype(g.c)>;
      g.epilogue = cuda::Epilogue::Activate;
      g.activation = layer.activation;
      g.parameters = layer.parameters;
      g.bias = data_of<T>(b);
      g.s = data_of<T>(s);
      g.ld_s = pitch_of(s);
    });
    return;
  }
  // The library adds the bias, before it rounds to 16 bits: near 0 that decides on the side of relu.
  Tensor& sum = s.defined() ? s : x;
  if (b.defined()) {
    at::addmm_out(sum, b, in, w.t());
  } else {
    at::mm_out(sum, in, w.t());
  }
  if (layer.activation != Activation::Identity) activate(call, sum, x, layer);
}

// below = (ds w) * f'(saved) and db, of the layer below; and its x once more, where that is defined.
void backward_layer(const Call& call, const Tensor& ds, const Tensor& w, const Tensor& saved, Tensor below,
                    const Tensor& db, const Tensor& x, const LayerActivation& layer) {
  if (cuda::plan(shape_of(ds, w.size(1), w.size(0)), cuda::Follows::Something) == cuda::Path::Gemm) {
    gemm(call, ds, w, below, [&](auto& g) {
      using T = std::remove_pointer_t<decltype(g.c)>;
      g.epilogue = cuda::Epilogue::Differentiate;
      g.activation = layer.activation;
      g.parameters = layer.parameters;
      g.saved = data_of<T>(saved);
      g.ld_saved = pitch_of(saved);
      g.db = data_of<T>(db);
    });
    if (x.defined()) activate(call, saved, x, layer);
    return;
  }
  at::mm_out(below, ds, w);
  const bool identity = layer.activation == Activation::Identity;
  if (!identity || db.defined()) differentiate(call, below, saved, identity ? Tensor() : below, db, x, layer);
}

// dw = ds^T in, and dx = ds w of the lowest layer.
void product(const Call& call, const Tensor& a, const Tensor& b, Tensor c, cuda::Path path) {
  if (path == cuda::Path::Gemm) {
    gemm(call, a, b, c, [](auto&) {});
  } else {
    at::mm_out(c, a, b);
  }
}

// The kernel of narrow networks has no float64, and no float32 that may not round.
template <class T>
constexpr bool CAN_BE_NARROW = sizeof(T) <= 4;

bool is_narrow(const Tensor& x, c10::IntArrayRef sizes) {
  bool narrow = false;
  const int64_t widest = *std::max_element(sizes.begin(), sizes.end());
  if (!cuda::plan_narrow(static_cast<int>(x.element_size()), widest, batch_of(x))) return false;
  visit(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (CAN_BE_NARROW<T>) {
      narrow =
          (sizeof(T) == 2 || may_round(x)) &&
          cuda::is_narrow<T>(static_cast<int>(sizes.size()) - 1, static_cast<int>(std::min<int64_t>(widest, 1 << 20)),
                             cuda::device_of(x.device().index()));
    }
  });
  return narrow;
}

// f(pass) with the rows and the layers of either pass filled in; what it points to lives as long as f runs.
template <template <class> class PASS, class F>
void with_narrow(const Tensor& rows, c10::IntArrayRef sizes, const Tensors& weights, const Tensors& biases,
                 const Chain& chain, const Tensors& kept, F f) {
  visit(rows.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if constexpr (CAN_BE_NARROW<T>) {
      PASS<T> pass{};
      Tensors owners;
      pass.batch = rows.size(0);
      pass.x = data_of<T>(rows);
      pass.ld_x = pitch_of(rows);
      pass.depth = static_cast<int>(chain.size());
      for (size_t l = 0; l < chain.size(); ++l) {
        const Tensor w = rows_of(weights[l]), b = contiguous_bias(biases[l]);
        owners.insert(owners.end(), {w, b});
        pass.layers[l] = {static_cast<int>(sizes[l]),
                          static_cast<int>(sizes[l + 1]),
                          data_of<T>(w),
                          pitch_of(w),
                          data_of<T>(b),
                          chain[l].activation,
                          chain[l].parameters,
                          data_of<T>(kept[l]),
                          pitch_of(kept[l])};
      }
      f(pass);
    }
  });
}

Tensor forward_on_cuda(const Tensor& x, const Network& network, Kept* kept) {
  const Call call(x.device());
  const size_t depth = network.depth();
  const int64_t batch = batch_of(x);
  std::vector<int64_t> sizes{network.weights[0].size(1)};
  for (const Tensor& w : network.weights) sizes.push_back(w.size(0));
  Tensors outputs(depth), summations(depth);
  for (size_t l = 0; l < depth; ++l) {
    if (kept && network.chain[l].saved() == Saved::Summation) summations[l] = empty_rows(batch, sizes[l + 1], x);
    if (kept && l + 1 < depth && composition::keeps_output(network.chain, l)) {
      outputs[l] = empty_rows(batch, sizes[l + 1], x);
    }
  }
  const Tensor output = outputs[depth - 1] = shaped_like(x, sizes[depth]);
  const Tensor in = rows_of(x), last = output.view({batch, sizes[depth]});
  if (is_narrow(x, sizes)) {
    Tensors wanted;
    for (size_t l = 0; l < depth; ++l) {
      wanted.push_back(summations[l].defined() ? summations[l] : l + 1 < depth ? outputs[l] : Tensor());
    }
    with_narrow<cuda::NarrowForward>(in, sizes, network.weights, network.biases, network.chain, wanted, [&](auto& g) {
      using T = std::remove_pointer_t<decltype(g.y)>;
      g.y = data_of<T>(last);
      g.ld_y = pitch_of(last);
      call.check(cuda::narrow_forward(g, cuda::device_of(x.device().index()), call.stream()), "narrow_forward");
    });
  } else {
    Tensor rows = in;
    for (size_t l = 0; l < depth; ++l) {
      const Tensor next = l + 1 == depth         ? last
                          : outputs[l].defined() ? outputs[l]
                                                 : empty_rows(batch, sizes[l + 1], x);
      forward_layer(call, rows, network.weights[l], contiguous_bias(network.biases[l]), summations[l], next,
                    network.chain[l]);
      rows = next;
    }
  }
  if (kept) *kept = {std::move(outputs), std::move(summations)};
  return output;
}

// What has been read is let go of at once: it goes back to torch's allocator where autograd holds it no more.
Tensors backward_on_cuda(const Tensor& dy, const Tensor& x, c10::IntArrayRef sizes, const Tensors& weights, Kept kept,
                         Release, const Chain& chain, const Needs& needs) {
  const Call call(dy.device());
  const size_t depth = weights.size();
  const int64_t batch = batch_of(dy);
  Tensors gradients(1 + 2 * depth);
  const auto dw = [&](size_t l) -> Tensor& { return gradients[1 + l]; };
  const auto db = [&](size_t l) -> Tensor& { return gradients[1 + depth + l]; };
  size_t lowest = needs.x ? 0 : depth;
  for (size_t l = depth; l-- > 0;) {
    if (needs.weights[l]) dw(l) = at::empty({sizes[l + 1], sizes[l]}, dy.options());
    if (needs.biases[l]) db(l) = at::empty({sizes[l + 1]}, dy.options());
    if (needs.weights[l] || needs.biases[l]) lowest = std::min(lowest, l);
  }
  const auto saved = [&](size_t l) {
    const Saved reads = chain[l].saved();
    return reads == Saved::Nothing ? Tensor() : rows_of(reads == Saved::Summation ? kept.s[l] : kept.x[l]);
  };

  // The narrow kernels want the network from its input on, as training has it.
  Tensors read(depth);
  bool complete = needs.weights[0];
  for (size_t l = 0; l < depth; ++l) {
    const bool reads = chain[l].saved() != Saved::Nothing;
    const Tensor& one = chain[l].saved() == Saved::Summation ? kept.s[l] : kept.x[l];
    if (one.defined() && (reads || l + 1 < depth)) read[l] = rows_of(one);
    complete = complete && (read[l].defined() || (!reads && l + 1 == depth)) && (l == 0 || weights[l].defined());
  }
  if (complete && is_narrow(dy, sizes)) {
    Tensors operands = weights;
    if (!weights[0].defined()) operands[0] = dw(0);  // where dx is not wanted, any numbers
    const Tensor top = rows_of(dy);
    if (needs.x) gradients[0] = shaped_like(dy, sizes[0]);
    with_narrow<cuda::NarrowBackward>(rows_of(x), sizes, operands, Tensors(depth), chain, read, [&](auto& g) {
      using T = std::remove_pointer_t<decltype(g.dx)>;
      g.dy = data_of<T>(top);
      g.ld_dy = pitch_of(top);
      g.dx = data_of<T>(gradients[0]);
      g.ld_dx = sizes[0];
      for (size_t l = 0; l < depth; ++l) {
        g.dw[l] = data_of<T>(dw(l));
        g.db[l] = data_of<T>(db(l));
      }
      const cuda::Device device = cuda::device_of(dy.device().index());
      const Workspace workspace(cuda::narrow_workspace(g, device), dy);
      g.workspace = workspace.data();
      call.check(cuda::narrow_backward(g, device, call.stream()), "narrow_backward");
    });
    return gradients;
  }

  const bool identity = chain[depth - 1].activation == Activation::Identity;
  const Tensor top = rows_of(dy);
  Tensor ds = identity ? top : empty_rows(batch, sizes[depth], dy);
  if (!identity || needs.biases[depth - 1]) {
    differentiate(call, top, saved(depth - 1), identity ? Tensor() : ds, db(depth - 1), Tensor(), chain[depth - 1]);
  }
  for (size_t l = depth; l-- > lowest;) {
    // The layer's input, which is made again from s(l-1) where that is what was kept.
    Tensor in, again;
    if (needs.weights[l]) {
      in = l == 0 ? x : kept.x[l - 1];
      if (!in.defined()) in = again = empty_rows(batch, sizes[l], dy);
    }
    Tensor below;
    if (l > lowest) {
      below = empty_rows(batch, sizes[l], dy);
      backward_layer(call, ds, weights[l], saved(l - 1), below, db(l - 1), again, chain[l - 1]);
    } else if (again.defined()) {
      activate(call, saved(l - 1), again, chain[l - 1]);
    }
    const cuda::Path path = cuda::plan(shape_of(dy, sizes[l], sizes[l + 1]), cuda::Follows::Nothing);
    if (needs.weights[l]) product(call, ds.t(), rows_of(in), dw(l), path);
    if (l == 0 && needs.x) {
      gradients[0] = shaped_like(dy, sizes[0]);
      product(call, ds, weights[0], gradients[0].view({batch, sizes[0]}), path);
    }
    ds = below;
    if (l > 0) kept.x[l - 1] = kept.s[l - 1] = Tensor();
  }
  return gradients;
}

// However many dimensions: as rows of a multiple of 16 bytes, of which a thread has several, and what is left over.
Tensor activation_on_cuda(const Tensor& s, const LayerActivation& layer) {
  constexpr int64_t ROW = 4096;
  const Call call(s.device());
  const Tensor in = s.contiguous(), x = at::empty(in.sizes(), in.options());
  const int64_t size = in.numel(), whole = size / ROW * ROW;
  const auto part = [&](int64_t begin, int64_t rows, int64_t columns) {
    const auto of = [&](const Tensor& t) {
      return t.view({size}).narrow(0, begin, rows * columns).view({rows, columns});
    };
    activate(call, of(in), of(x), layer);
  };
  if (whole) part(0, whole / ROW, ROW);
  if (size > whole) part(whole, 1, size - whole);
  return x;
}

NetworkPlan plan_on_cuda(const Tensor& x, const Network& network) {
  NetworkPlan report{"sm_" + std::to_string(cuda::capability(x.device().index())), 0, {}};
  const int64_t batch = batch_of(x);
  std::vector<int64_t> sizes{network.weights[0].size(1)};
  for (const Tensor& w : network.weights) sizes.push_back(w.size(0));
  const bool narrow = is_narrow(x, sizes);
  for (size_t l = 0; l < network.depth(); ++l) {
    const Tensor& w = network.weights[l];
    LayerPlan layer{};
    layer.in = w.size(1);
    layer.out = w.size(0);
    layer.activation = network.chain[l].info().name;
    layer.saved = network.chain[l].saved();
    layer.kernel = narrow ? "narrow, forward in one kernel" : cuda::name_of(shape_of(x, layer.in, layer.out));
    layer.flops = 2 * batch * layer.in * layer.out;
    report.layers.push_back(layer);
  }
  return report;
}

// A device that is not there has been named by a tracer's stand-in, whose call it only records.
const char* reason_on_cuda(c10::Device device) {
  const int capability = cuda::capability(device.has_index() ? device.index() : 0);
  return capability != 0 && capability < 80 ? "the kernels need compute capability 8.0" : nullptr;
}

std::vector<Threshold> cuda_thresholds() {
  cuda::Thresholds& table = cuda::thresholds();
#define X(name, value) {#name, &table.name},
  return {PYPERC_CUDA_THRESHOLDS(X)};
#undef X
}

const bool added = add_backend(c10::DeviceType::CUDA, {forward_on_cuda, backward_on_cuda, activation_on_cuda,
                                                       plan_on_cuda, reason_on_cuda, cuda_thresholds});

}  // namespace

}  // namespace pyperc::native
