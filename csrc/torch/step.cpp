// The training step as a Python type, in the C API of Python for the sake of small networks: checks, what is read from
// torch's tensors and dictionaries on every call, memory.
#include "step.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <mutex>

#include "../cpu/dispatch.h"
#include "../cpu/step.h"
#include "losses.h"
#include "network.h"
#include "threads.h"

namespace pyperc {

namespace {

namespace py = pybind11;

struct OptimizerInfo {
  std::string name;
  std::vector<Setting> settings;
  std::vector<std::string> states;
};

template <class O>
OptimizerInfo describe() {
  OptimizerInfo info{O::name, {}, {}};
  for (const Setting& setting : O::settings) {
    if (setting.name) info.settings.push_back(setting);
  }
  for (const char* state : O::states) {
    if (state) info.states.emplace_back(state);
  }
  return info;
}

const std::vector<OptimizerInfo>& optimizer_list() {
  static const std::vector<OptimizerInfo> list = {
#define X(O) describe<O>(),
      PYPERC_OPTIMIZERS(X)
#undef X
  };
  return list;
}

Optimizer optimizer_of(const std::string& name) {
  const auto& list = optimizer_list();
  std::string names;
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].name == name) return static_cast<Optimizer>(i);
    names += (names.empty() ? "" : ", ") + list[i].name;
  }
  TORCH_CHECK_VALUE(false, "step: optimizer must be one of ", names, "; got '", name, "'");
}

// While it lives, other threads may run Python.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// A weight or a bias of the network.
struct Learned {
  py::object object;
  Tensor value;
  int group = -1;
  Tensor master;  // of 16 bits: the float32 numbers that it is rounded from
  Tensor state[MAX_STATES];
  int64_t count = 0;
  bool trains() const { return value.defined() && group >= 0 && value.requires_grad(); }
};

struct Watched {
  py::object dictionary, key, value;
};
struct Sized {
  py::object entries;  // a dict or a list
  Py_ssize_t size;
};

// Workspace that is kept from step to step: a step asks for the same pieces each time.
class Pool final : public Memory {
 public:
  void* take(size_t bytes) override {
    // The smallest that is large enough, but not one that something much larger needs again; else the largest of those
    // that are too small makes way.
    Piece *best = nullptr, *small = nullptr;
    for (Piece& piece : pieces_) {
      if (piece.taken) continue;
      if (piece.bytes < bytes) {
        if (!small || piece.bytes > small->bytes) small = &piece;
      } else if (piece.bytes <= 4 * bytes && (!best || piece.bytes < best->bytes)) {
        best = &piece;
      }
    }
    if (!best) {
      best = small ? small : &pieces_.emplace_back();
      best->memory.clear();
      best->bytes = 0;
      best->memory = c10::GetCPUAllocator()->allocate(bytes);
      best->bytes = bytes;
    }
    best->taken = true;
    return best->memory.get();
  }
  void give_back(void* memory) override {
    for (Piece& piece : pieces_) {
      if (piece.memory.get() == memory) piece.taken = false;
    }
  }
  void release() { pieces_.clear(); }
  size_t bytes() const {
    size_t sum = 0;
    for (const Piece& piece : pieces_) sum += piece.bytes;
    return sum;
  }

 private:
  struct Piece {
    c10::DataPtr memory;
    size_t bytes = 0;
    bool taken = false;
  };
  std::vector<Piece> pieces_;
};

using Settings = std::array<double, MAX_SETTINGS>;

struct State {
  at::ScalarType dtype;
  std::vector<Learned> parameters;  // weights, then biases
  Chain chain{{}, {}};
  std::vector<double> dropout;
  bool drops = false;
  LossChoice loss{"mse", {}};
  Reduction reduction = Reduction::Mean;
  Tensor class_weight;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  Optimizer optimizer = Optimizer::Sgd;
  std::vector<py::object> groups;
  std::vector<py::object> keys;  // of the settings, in their order
  std::vector<Settings> settings;
  double max_norm = std::numeric_limits<double>::infinity();
  OnNan on_nan = OnNan::Stop;
  at::Generator generator;
  std::vector<Watched> watched;
  std::vector<Sized> sizes;
  Tensor scale, shift;

  std::mutex busy;  // one step at a time
  Pool pool;
  int64_t steps = 0, batches = 0, kept = 0;
  double norm = std::numeric_limits<double>::quiet_NaN();

  size_t depth() const { return chain.size(); }
  int64_t inputs() const { return parameters[0].value.size(1); }
  int64_t outputs() const { return parameters[depth() - 1].value.size(0); }
};

struct StepObject {
  PyObject_HEAD vectorcallfunc call;
  State* state;
};
State& state_of(PyObject* self) { return *reinterpret_cast<StepObject*>(self)->state; }

template <class F>
auto with_dtype(at::ScalarType dtype, F f) {
  return dtype == at::kFloat ? f(0.0f) : dtype == at::kDouble ? f(0.0) : f(BFloat16{});
}

std::string text(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// What a network's loss and its parameters' states are in.
at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// What the kernels read in place or write: dense, on the CPU, of that dtype and shape, rows of adjacent elements.
void check(const Tensor& t, const std::string& name, at::ScalarType dtype, c10::IntArrayRef shape) {
  TORCH_CHECK_TYPE(t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == dtype, "step: ", name,
                   " must be a dense ", text(dtype), " tensor on the CPU, got ", t.toString());
  TORCH_CHECK_VALUE(t.sizes() == shape, "step: ", name, " must be of shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(shape.empty() || t.stride(-1) == 1 || t.size(-1) <= 1, "step: ", name,
                    " must have rows of adjacent elements, got strides ", t.strides());
}

int64_t row_stride(const Tensor& t) { return t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : t.size(-1); }

// Whether somebody wants to be shown the operations, or their gradients: autograd has to take the step.
bool is_watched(const State& state) {
  if (c10::impl::TorchDispatchModeTLS::stack_len() > 0 || torch::jit::tracer::isTracing() ||
      at::autocast::is_autocast_enabled(at::kCPU)) {
    return true;
  }
  const auto hung = [](PyObject* hooks) { return hooks && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) > 0; };
  for (const Learned& p : state.parameters) {
    const auto* object = reinterpret_cast<const THPVariable*>(p.object.ptr());
    if (object && (hung(object->backward_hooks) || hung(object->post_accumulate_grad_hooks))) return true;
  }
  return false;
}

// Whether the network is still the one that the step was made for, and the step's to compute.
bool unchanged(const State& state) {
  for (const Watched& watched : state.watched) {
    PyObject* value = PyDict_GetItemWithError(watched.dictionary.ptr(), watched.key.ptr());
    if ((value ? value : Py_None) != watched.value.ptr()) return false;
  }
  for (const Sized& sized : state.sizes) {
    PyObject* entries = sized.entries.ptr();
    if ((PyDict_Check(entries) ? PyDict_GET_SIZE(entries) : PyList_GET_SIZE(entries)) != sized.size) return false;
  }
  return !is_watched(state);
}

double number(PyObject* value, const Setting& setting) {
  if (setting.item >= 0) {
    py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(value, setting.item));
    if (!item) throw py::error_already_set();
    return number(item.ptr(), {setting.name, 0});
  }
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_False) return 0;
  if (value == Py_True) return 1;
  const py::object converted = py::reinterpret_steal<py::object>(PyNumber_Float(value));
  if (!converted) throw py::error_already_set();
  return PyFloat_AS_DOUBLE(converted.ptr());
}

void read_settings(State& state) {
  const auto& list = optimizer_list()[static_cast<size_t>(state.optimizer)].settings;
  for (size_t g = 0; g < state.groups.size(); ++g) {
    for (size_t i = 0; i < list.size(); ++i) {
      PyObject* value = PyDict_GetItemWithError(state.groups[g].ptr(), state.keys[i].ptr());
      state.settings[g][i] = value ? number(value, list[i]) : list[i].value;
    }
  }
}

// The layers as they are now. Gradients, where wanted: one for each parameter that trains, undefined for the others.
template <class S>
std::vector<StepLayer<S>> layers_of(State& state, const Tensors* gradients) {
  const size_t depth = state.depth();
  std::vector<StepLayer<S>> layers(depth);
  for (size_t l = 0; l < depth; ++l) {
    StepLayer<S>& layer = layers[l];
    layer.dropout = state.dropout[l];
    for (const size_t i : {l, depth + l}) {
      Learned& p = state.parameters[i];
      if (!p.value.defined()) continue;
      Trained<S>& w = i == l ? layer.w : layer.b;
      w.data = static_cast<S*>(p.value.mutable_data_ptr());
      w.ld = row_stride(p.value);
      if (!p.trains()) continue;
      if (gradients) {
        w.gradient = static_cast<S*>((*gradients)[i].mutable_data_ptr());
        continue;
      }
      if (p.master.defined()) w.master = static_cast<Wide<S>*>(p.master.mutable_data_ptr());
      w.settings = state.settings[static_cast<size_t>(p.group)].data();
      w.count = p.count + 1;
      const int live = live_states(state.optimizer, w.settings);
      for (int s = 0; s < live; ++s) {
        TORCH_CHECK_VALUE(p.state[s].defined(), "step: state of parameter ", i, " must hold ",
                          optimizer_list()[static_cast<size_t>(state.optimizer)].states[static_cast<size_t>(s)],
                          ", which the settings of its group ask for");
        w.state[s] = static_cast<Wide<S>*>(p.state[s].mutable_data_ptr());
        w.ld_state = row_stride(p.state[s]);
      }
    }
    layer.spec = {state.parameters[l].value.size(1), state.parameters[l].value.size(0), state.chain[l].activation,
                  state.chain[l].parameters};
  }
  return layers;
}

// Parameters may have been given other memory (`.data = `): their shapes must still fit.
void check_parameters(const State& state) {
  const size_t depth = state.depth();
  int64_t in = -1;
  for (size_t l = 0; l < depth; ++l) {
    const Tensor& w = state.parameters[l].value;
    const Tensor& b = state.parameters[depth + l].value;
    const bool good = w.dim() == 2 && (in < 0 || w.size(1) == in) && w.scalar_type() == state.dtype &&
                      w.device().is_cpu() && (w.stride(1) == 1 || w.size(1) == 1) &&
                      (!b.defined() || (b.dim() == 1 && b.size(0) == w.size(0) && b.scalar_type() == state.dtype &&
                                        b.device().is_cpu() && (b.stride(0) == 1 || b.size(0) == 1)));
    TORCH_CHECK_VALUE(good, "step: weights[", l, "] and biases[", l, "] must be ", text(state.dtype),
                      " on the CPU, [out, in] with rows of adjacent elements and [out], and follow the layer before, ",
                      "got ", w.toString(), " ", w.sizes(), b.defined() ? " and " : "",
                      b.defined() ? b.toString() : "");
    in = w.size(0);
  }
  for (const Learned& p : state.parameters) {
    for (const Tensor& s : p.state) {
      TORCH_CHECK_VALUE(!s.defined() || s.sizes() == p.value.sizes(), "step: the state of a parameter of shape ",
                        p.value.sizes(), " must have that shape, got ", s.sizes());
    }
  }
}

Stored stored_as(const State& state, at::ScalarType dtype) {
  if (dtype == state.dtype && dtype == at::kBFloat16) return Stored::BFloat16;
  switch (dtype) {
    case at::kFloat: return Stored::Float32;
    case at::kDouble: return Stored::Float64;
    case at::kByte: return Stored::UInt8;
    default:
      TORCH_CHECK_TYPE(false, "step: x must have the network's dtype, or be float32, float64 or uint8, got ",
                       text(dtype));
  }
}

// What a call is given; `owners` keeps what had to be copied.
struct Arguments {
  Tensor x, y, weight;
  bool probabilities = false;
};

const Tensor& tensor(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(THPVariable_CheckExact(object), "step: ", name, " must be a torch.Tensor, got ",
                   Py_TYPE(object)->tp_name);
  return THPVariable_Unpack(object);
}

Arguments arguments_of(const State& state, PyObject* x, PyObject* y, PyObject* weight) {
  Arguments a{tensor(x, "x"), tensor(y, "y"), {}};
  const int64_t in = state.inputs(), out = state.outputs();
  TORCH_CHECK_TYPE(a.x.device().is_cpu() && a.x.layout() == at::kStrided, "step: x must be a dense tensor on the CPU, ",
                   "got ", a.x.toString());
  stored_as(state, a.x.scalar_type());
  TORCH_CHECK_VALUE(a.x.dim() >= 1 && a.x.size(-1) == in, "step: x must be [..., ", in, "], got ", a.x.sizes());
  if (a.x.is_neg()) a.x = a.x.resolve_neg();
  const int64_t dims = a.x.dim();
  const c10::IntArrayRef lead = a.x.sizes().slice(0, static_cast<size_t>(dims - 1));
  const int64_t batch = dims == 2 ? a.x.size(0) : a.x.numel() / std::max<int64_t>(1, in);
  TORCH_CHECK_TYPE(a.y.device().is_cpu() && a.y.layout() == at::kStrided, "step: y must be a dense tensor on the CPU, ",
                   "got ", a.y.toString());
  if (state.loss.over() == LossOver::Row) {
    if (a.y.scalar_type() == at::kLong) {
      TORCH_CHECK_VALUE(a.y.sizes() == lead, "step: y must be int64 of shape ", lead,
                        ", or the classes' probabilities, got ", a.y.sizes());
    } else {
      a.probabilities = true;
      TORCH_CHECK_TYPE(a.y.scalar_type() == state.dtype, "step: y must be int64, or the classes' probabilities in ",
                       text(state.dtype), ", got ", text(a.y.scalar_type()));
    }
  } else {
    TORCH_CHECK_TYPE(a.y.scalar_type() == state.dtype, "step: y must have the network's dtype ", text(state.dtype),
                     ", got ", text(a.y.scalar_type()));
  }
  if (a.y.scalar_type() == state.dtype) {
    TORCH_CHECK_VALUE(
        a.y.dim() == dims && a.y.size(-1) == out && a.y.sizes().slice(0, static_cast<size_t>(dims - 1)) == lead,
        "step: y must be of shape ", lead, " + [", out, "], got ", a.y.sizes());
  }
  if (weight && weight != Py_None) {
    a.weight = tensor(weight, "weight").contiguous();
    check(a.weight, "weight", state.dtype, lead);
  }
  if (dims != 2) {
    a.y = a.y.scalar_type() == state.dtype ? a.y.reshape({batch, out}) : a.y.reshape({batch});
    if (a.weight.defined()) a.weight = a.weight.reshape({batch});
    a.x = a.x.reshape({batch, in});
  }
  if (a.y.is_neg()) a.y = a.y.resolve_neg();
  if (!a.y.is_contiguous() && !(a.y.dim() == 2 && a.y.stride(1) == 1)) a.y = a.y.contiguous();
  return a;
}

template <class S>
Batch<S> batch_of(const State& state, Arguments& a) {
  const int64_t rows = a.x.size(0), in = a.x.size(1);
  Batch<S> batch;
  batch.size = batch.rows = rows;
  batch.stored = stored_as(state, a.x.scalar_type());
  if (state.scale.defined()) {
    batch.scale = state.scale.const_data_ptr<Wide<S>>();
    batch.shift = state.shift.const_data_ptr<Wide<S>>();
  }
  // Other strides than unit ones are for what is read in place.
  if (a.x.stride(1) != 1 && in > 1 && (a.x.scalar_type() != state.dtype || batch.scale)) a.x = a.x.contiguous();
  batch.x = a.x.const_data_ptr();
  batch.rs = rows > 1 ? a.x.stride(0) : in;
  batch.cs = in > 1 ? a.x.stride(1) : 1;
  if (a.y.scalar_type() == at::kLong) {
    batch.target = a.y.const_data_ptr<int64_t>();
  } else {
    batch.y = static_cast<const S*>(a.y.const_data_ptr());
    batch.ld_y = row_stride(a.y);
  }
  if (a.weight.defined()) batch.weight = static_cast<const S*>(a.weight.const_data_ptr());
  return batch;
}

// A 64-bit number of torch's generator where there is something to drop.
uint64_t draw(const State& state) {
  if (!state.drops) return 0;
  at::Generator generator = state.generator.defined() ? state.generator : at::detail::getDefaultCPUGenerator();
  const std::lock_guard<std::mutex> lock(generator.mutex());
  return at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
}

template <class S>
Step<S> step_of(const State& state, const Batch<S>& batch, const std::vector<StepLayer<S>>& layers) {
  Step<S> step{};
  step.batch = batch;
  step.layers = layers.data();
  step.depth = static_cast<int>(layers.size());
  step.objective.loss = state.loss.loss;
  step.objective.over = state.loss.over();
  step.objective.parameters = state.loss.parameters;
  step.objective.reduction = state.reduction;
  if (state.class_weight.defined()) step.objective.class_weight = state.class_weight.const_data_ptr<Wide<S>>();
  step.objective.smoothing = state.label_smoothing;
  step.objective.ignore_index = state.ignore_index;
  step.optimizer = state.optimizer;
  step.max_norm = state.max_norm;
  step.on_nan = state.on_nan;
  return step;
}

template <class S>
StepResult run(State& state, const Step<S>& step) {
  const Isa& here = isa();
  const Parallel parallel = torch_threads();
  const StepResult result = pyperc::step(here.kernels(S{}), here.kernels(Wide<S>{}), step, parallel, state.pool);
  state.kept = result.kept;
  if (std::isfinite(step.max_norm)) state.norm = result.norm;  // gradients alone leave that of the last step
  return result;
}

void count(State& state) {
  ++state.steps;
  for (Learned& p : state.parameters) {
    if (p.trains()) ++p.count;
  }
}

void bump_versions(State& state) {
  for (Learned& p : state.parameters) {
    if (!p.trains()) continue;
    if (!p.value.is_inference()) p.value.unsafeGetTensorImpl()->bump_version();
    for (const Tensor& s : p.state) {
      if (s.defined() && !s.is_inference()) s.unsafeGetTensorImpl()->bump_version();
    }
    if (p.master.defined() && !p.master.is_inference()) p.master.unsafeGetTensorImpl()->bump_version();
  }
}

void raise(const State& state, const StepResult& result, const Tensor& y) {
  if (result.outcome == Outcome::NanLoss) {
    PyErr_SetString(PyExc_FloatingPointError, c10::str("step: the loss is ", result.loss, " in step ", state.steps + 1,
                                                       "; the parameters are those of before it")
                                                  .c_str());
  } else {
    PyErr_SetString(PyExc_IndexError,
                    c10::str("step: y must hold classes from 0 to ", state.outputs() - 1, " (or ", state.ignore_index,
                             ", which is ignored), got another one in row ", result.row, " of the batch")
                        .c_str());
  }
  throw py::error_already_set();
}

Tensor scalar(double value, at::ScalarType dtype) {
  const Tensor result = at::detail::empty_cpu({}, dtype);
  if (dtype == at::kDouble) {
    *result.mutable_data_ptr<double>() = value;
  } else {
    *result.mutable_data_ptr<float>() = static_cast<float>(value);
  }
  return result;
}

StepResult one_step(State& state, Arguments& arguments, const Tensors* gradients) {
  check_parameters(state);
  return with_dtype(state.dtype, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<StepLayer<S>> layers = layers_of<S>(state, gradients);
    const Batch<S> batch = batch_of<S>(state, arguments);
    Step<S> step = step_of(state, batch, layers);
    if (gradients) step.on_nan = OnNan::Ignore, step.max_norm = std::numeric_limits<double>::infinity();
    const Unlocked unlocked;
    step.seed = draw(state);
    return run(state, step);
  });
}

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  HANDLE_TH_ERRORS
  const Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (given < 2 || given > 3 || keywords) {
    PyErr_SetString(PyExc_TypeError, "Step: expected x, y and perhaps weight, by position");
    return nullptr;
  }
  State& state = state_of(self);
  if (!unchanged(state)) Py_RETURN_NONE;
  read_settings(state);
  Arguments arguments = arguments_of(state, args[0], args[1], given > 2 ? args[2] : nullptr);
  const std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
  TORCH_CHECK(lock.owns_lock(), "step: this step is running in another thread; make one for each thread");
  const StepResult result = one_step(state, arguments, nullptr);
  if (result.outcome != Outcome::Done) raise(state, result, arguments.y);
  count(state);
  bump_versions(state);
  return THPVariable_Wrap(scalar(result.loss, wide(state.dtype)));
  END_HANDLE_TH_ERRORS
}

PyObject* gradients(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *x, *y, *weight = nullptr;
  if (!PyArg_ParseTuple(args, "OO|O", &x, &y, &weight)) return nullptr;
  State& state = state_of(self);
  if (!unchanged(state)) return py::make_tuple(py::none(), py::list()).release().ptr();
  Arguments arguments = arguments_of(state, x, y, weight);
  const std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
  TORCH_CHECK(lock.owns_lock(), "step: this step is running in another thread; make one for each thread");
  Tensors list;
  for (const Learned& p : state.parameters) {
    list.push_back(p.trains() ? at::detail::empty_cpu(p.value.sizes(), state.dtype) : Tensor());
  }
  const StepResult result = one_step(state, arguments, &list);
  if (result.outcome != Outcome::Done) raise(state, result, arguments.y);
  py::list found;
  for (Tensor& t : list) {
    found.append(t.defined() ? py::reinterpret_steal<py::object>(THPVariable_Wrap(t)) : py::none());
  }
  const auto loss = py::reinterpret_steal<py::object>(THPVariable_Wrap(scalar(result.loss, wide(state.dtype))));
  return py::make_tuple(loss, found).release().ptr();
  END_HANDLE_TH_ERRORS
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

PyObject* epoch(PyObject* self, PyObject* args, PyObject* keywords) {
  HANDLE_TH_ERRORS
  static const char* names[] = {"X", "y", "order", "batch_size", "losses", "begin", "seconds", "weight", "lr", nullptr};
  PyObject *x, *y, *order_object, *losses_object, *weight = nullptr, *lr_object = nullptr;
  Py_ssize_t batch_size, begin = 0;
  double seconds = std::numeric_limits<double>::infinity();
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOnO|ndOO", const_cast<char**>(names), &x, &y, &order_object,
                                   &batch_size, &losses_object, &begin, &seconds, &weight, &lr_object)) {
    return nullptr;
  }
  State& state = state_of(self);
  if (!unchanged(state)) return PyLong_FromLong(-1);
  read_settings(state);
  Arguments arguments = arguments_of(state, x, y, weight);
  TORCH_CHECK_VALUE(batch_size >= 1, "step: batch_size must be at least 1, got ", batch_size);
  Tensor order, lr;
  if (order_object != Py_None) {
    order = tensor(order_object, "order");
    check(order, "order", at::kLong, {order.numel()});
  }
  const Tensor losses = tensor(losses_object, "losses");
  check(losses, "losses", at::kDouble, {losses.numel()});
  const int64_t batches = losses.numel(), rows = order.defined() ? order.numel() : arguments.x.size(0);
  TORCH_CHECK_VALUE(begin >= 0 && begin <= batches && (batches == 0 || (batches - 1) * batch_size < rows),
                    "step: losses must have an entry for each batch of at most ", batch_size, " of ", rows,
                    " rows, and begin lie within, got ", batches, " entries and begin ", begin);
  const size_t groups = state.groups.size();
  if (lr_object && lr_object != Py_None) {
    lr = tensor(lr_object, "lr");
    check(lr, "lr", at::kDouble, {batches, static_cast<int64_t>(groups)});
    TORCH_CHECK_VALUE(lr.is_contiguous(), "step: lr must be contiguous");
  }
  const std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
  TORCH_CHECK(lock.owns_lock(), "step: this step is running in another thread; make one for each thread");
  check_parameters(state);
  state.batches = begin;
  StepResult result{};
  with_dtype(state.dtype, [&](auto zero) {
    using S = decltype(zero);
    std::vector<StepLayer<S>> layers = layers_of<S>(state, nullptr);
    if (order.defined() && arguments.x.stride(1) != 1 && arguments.x.size(1) > 1) {
      arguments.x = arguments.x.contiguous();
    }
    Batch<S> all = batch_of<S>(state, arguments);
    const int64_t* rows_in_order = order.defined() ? order.const_data_ptr<int64_t>() : nullptr;
    double* found = losses.mutable_data_ptr<double>();
    const double* rates = lr.defined() ? lr.const_data_ptr<double>() : nullptr;
    const size_t element = arguments.x.element_size();
    const Unlocked unlocked;
    const double until = std::isfinite(seconds) ? seconds_now() + seconds : seconds;
    while (state.batches < batches) {
      const int64_t at = state.batches * batch_size;
      Batch<S> batch = all;
      batch.size = std::min<int64_t>(batch_size, rows - at);
      if (rows_in_order) {
        batch.order = rows_in_order + at;
      } else {
        batch.x = static_cast<const char*>(all.x) + static_cast<size_t>(at * all.rs) * element;
        if (all.y) batch.y += at * all.ld_y;
        if (all.target) batch.target += at;
        if (all.weight) batch.weight += at;
      }
      if (rates) {
        for (size_t g = 0; g < groups; ++g)
          state.settings[g][0] = rates[static_cast<size_t>(state.batches) * groups + g];
      }
      Step<S> step = step_of(state, batch, layers);
      step.seed = draw(state);
      result = run(state, step);
      if (result.outcome != Outcome::Done) return;
      found[state.batches] = result.loss;
      count(state);
      for (StepLayer<S>& layer : layers) {
        if (layer.w.settings) ++layer.w.count;
        if (layer.b.settings) ++layer.b.count;
      }
      ++state.batches;
      if (seconds_now() >= until) break;
    }
  });
  if (state.batches > begin) bump_versions(state);
  if (result.outcome != Outcome::Done) raise(state, result, arguments.y);
  return PyLong_FromLongLong(state.batches);
  END_HANDLE_TH_ERRORS
}

// A number for each input feature.
Tensor per_feature(const State& state, PyObject* value, const char* name) {
  const int64_t in = state.inputs();
  if (THPVariable_Check(value)) {
    const Tensor t = tensor(value, name).to(wide(state.dtype));
    check(t, name, wide(state.dtype), {in});
    return t.contiguous();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) throw py::error_already_set();
  const Tensor t = at::detail::empty_cpu({in}, wide(state.dtype));
  t.fill_(number);
  return t;
}

PyObject* set_input(PyObject* self, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *scale, *shift;
  if (!PyArg_ParseTuple(args, "OO", &scale, &shift)) return nullptr;
  State& state = state_of(self);
  const Tensor a = per_feature(state, scale, "scale"), b = per_feature(state, shift, "shift");
  const bool plain =
      PyFloat_Check(scale) && PyFloat_Check(shift) && PyFloat_AS_DOUBLE(scale) == 1 && PyFloat_AS_DOUBLE(shift) == 0;
  state.scale = plain ? Tensor() : a;
  state.shift = plain ? Tensor() : b;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* release(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  State& state = state_of(self);
  const std::unique_lock<std::mutex> lock(state.busy, std::try_to_lock);
  TORCH_CHECK(lock.owns_lock(), "step: this step is running in another thread");
  state.pool.release();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

Tensor optional_tensor(PyObject* object, const char* name) {
  return object == nullptr || object == Py_None ? Tensor() : tensor(object, name);
}

void check_layers(const State& state) {
  check_parameters(state);
  TORCH_CHECK_VALUE(state.chain.fusible(),
                    "step: an activation has parameters with which its derivative cannot be read ", "from its output");
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const Tensor& a = state.parameters[i].value;
    if (!a.defined() || a.numel() == 0) continue;
    for (size_t j = 0; j < i; ++j) {
      const Tensor& b = state.parameters[j].value;
      if (!b.defined() || b.numel() == 0) continue;
      const auto end = [](const Tensor& t) {
        int64_t last = 1;
        for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
        return static_cast<const char*>(t.const_data_ptr()) + static_cast<size_t>(last) * t.element_size();
      };
      const bool apart = end(a) <= static_cast<const char*>(b.const_data_ptr()) ||
                         end(b) <= static_cast<const char*>(a.const_data_ptr());
      TORCH_CHECK_VALUE(apart, "step: no two parameters may share memory, got parameters ", j, " and ", i,
                        " that do (counted through the weights and then the biases)");
    }
  }
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  HANDLE_TH_ERRORS
  static const char* names[] = {"weights",         "biases",    "chain",        "dropout",         "loss",
                                "loss_parameters", "optimizer", "groups",       "group_of",        "state",
                                "counts",          "reduction", "class_weight", "label_smoothing", "ignore_index",
                                "max_norm",        "on_nan",    "generator",    "masters",         "watched",
                                "sizes",           nullptr};
  PyObject *weights, *biases, *chain, *dropout, *loss_parameters, *groups, *group_of, *states, *counts;
  PyObject *class_weight = nullptr, *generator = nullptr, *masters = nullptr, *watched = nullptr, *sizes = nullptr;
  const char *loss, *optimizer, *reduction = "mean", *on_nan = "raise";
  double label_smoothing = 0, max_norm = std::numeric_limits<double>::infinity();
  long long ignore_index = -100;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOsOsOOOO|$sOdLdsOOOO", const_cast<char**>(names), &weights,
                                   &biases, &chain, &dropout, &loss, &loss_parameters, &optimizer, &groups, &group_of,
                                   &states, &counts, &reduction, &class_weight, &label_smoothing, &ignore_index,
                                   &max_norm, &on_nan, &generator, &masters, &watched, &sizes)) {
    return nullptr;
  }
  auto state = std::make_unique<State>();
  const auto sequence = [](PyObject* object) { return py::reinterpret_borrow<py::sequence>(object); };
  state->chain = *py::handle(chain).cast<const Chain*>();
  const size_t depth = state->chain.size();
  TORCH_CHECK_VALUE(depth >= 1, "step: the chain must have at least one layer");
  const auto length = [&](PyObject* list, const char* name, size_t expected) {
    TORCH_CHECK_VALUE(py::len(py::handle(list)) == expected, "step: ", name, " must have ", expected, " entries, got ",
                      py::len(py::handle(list)));
  };
  length(weights, "weights", depth);
  length(biases, "biases", depth);
  length(dropout, "dropout", depth);
  length(group_of, "group_of", 2 * depth);
  length(states, "state", 2 * depth);
  length(counts, "counts", 2 * depth);
  state->parameters.resize(2 * depth);
  for (const py::handle group : sequence(groups)) {
    TORCH_CHECK_TYPE(PyDict_Check(group.ptr()), "step: groups must hold dicts, got ", Py_TYPE(group.ptr())->tp_name);
    state->groups.push_back(py::reinterpret_borrow<py::object>(group));
  }
  state->settings.resize(state->groups.size());
  state->optimizer = optimizer_of(optimizer);
  for (const Setting& setting : optimizer_list()[static_cast<size_t>(state->optimizer)].settings) {
    state->keys.push_back(py::reinterpret_steal<py::object>(PyUnicode_InternFromString(setting.name)));
  }
  for (size_t i = 0; i < 2 * depth; ++i) {
    Learned& p = state->parameters[i];
    const py::object value = i < depth ? sequence(weights)[i] : sequence(biases)[i - depth];
    if (i < depth || !value.is_none()) {
      p.value = tensor(value.ptr(), i < depth ? "weights" : "biases");
      p.object = value;
    }
    p.group = py::object(sequence(group_of)[i]).cast<int>();
    TORCH_CHECK_VALUE(p.group >= -1 && p.group < static_cast<int>(state->groups.size()), "step: group_of must hold ",
                      "numbers of groups, or -1, got ", p.group);
    p.count = py::object(sequence(counts)[i]).cast<int64_t>();
    const py::object own = sequence(states)[i];
    if (own.is_none()) continue;
    const py::sequence list = own;
    TORCH_CHECK_VALUE(list.size() <= MAX_STATES, "step: state[", i, "] must have at most ", MAX_STATES, " entries");
    for (size_t s = 0; s < list.size(); ++s) {
      const py::object entry = list[s];
      if (!entry.is_none()) p.state[s] = tensor(entry.ptr(), "state");
    }
  }
  state->dtype = state->parameters[0].value.scalar_type();
  const bool narrow = state->dtype == at::kBFloat16;
  TORCH_CHECK_TYPE(narrow || state->dtype == at::kFloat || state->dtype == at::kDouble,
                   "step: weights must be float32, float64 or bfloat16, got ", text(state->dtype));
  if (masters && masters != Py_None) length(masters, "masters", 2 * depth);
  for (size_t i = 0; narrow && i < 2 * depth; ++i) {
    Learned& p = state->parameters[i];
    if (!p.value.defined() || p.group < 0) continue;
    TORCH_CHECK_TYPE(masters && masters != Py_None, "step: masters must be given for bfloat16 parameters");
    p.master = tensor(py::object(sequence(masters)[i]).ptr(), "masters");
    check(p.master, c10::str("masters[", i, "]"), at::kFloat, p.value.sizes());
    TORCH_CHECK_VALUE(p.master.is_contiguous(), "step: masters[", i, "] must be contiguous");
  }
  check_layers(*state);
  int64_t row_stride_of_state = 0;
  for (size_t i = 0; i < 2 * depth; ++i) {
    const Learned& p = state->parameters[i];
    row_stride_of_state = 0;
    for (const Tensor& s : p.state) {
      if (!s.defined()) continue;
      check(s, c10::str("state[", i, "]"), wide(state->dtype), p.value.sizes());
      TORCH_CHECK_VALUE(row_stride_of_state == 0 || row_stride(s) == row_stride_of_state, "step: the tensors of state[",
                        i, "] must have the same strides");
      row_stride_of_state = row_stride(s);
    }
  }
  for (const py::handle p : sequence(dropout)) {
    state->dropout.push_back(p.cast<double>());
    TORCH_CHECK_VALUE(state->dropout.back() >= 0 && state->dropout.back() <= 1,
                      "step: dropout must hold probabilities, ", "got ", state->dropout.back());
    state->drops = state->drops || state->dropout.back() > 0;
  }
  TORCH_CHECK_VALUE(state->dropout.back() == 0, "step: dropout after the last layer must be 0, got ",
                    state->dropout.back());
  state->loss = LossChoice(loss, py::handle(loss_parameters).cast<std::vector<double>>());
  const std::string kind = reduction, nan = on_nan;
  TORCH_CHECK_VALUE(kind == "mean" || kind == "sum", "step: reduction must be mean or sum, got '", kind, "'");
  state->reduction = kind == "mean" ? Reduction::Mean : Reduction::Sum;
  TORCH_CHECK_VALUE(nan == "raise" || nan == "ignore", "step: on_nan must be raise or ignore, got '", nan, "'");
  state->on_nan = nan == "raise" ? OnNan::Stop : OnNan::Ignore;
  state->class_weight = optional_tensor(class_weight, "class_weight");
  const bool row = state->loss.over() == LossOver::Row;
  if (state->class_weight.defined()) {
    if (narrow) state->class_weight = state->class_weight.to(at::kFloat);
    check(state->class_weight, "class_weight", wide(state->dtype), {state->outputs()});
  }
  TORCH_CHECK_VALUE(row || (!state->class_weight.defined() && label_smoothing == 0), "step: class_weight and ",
                    "label_smoothing are for cross_entropy alone, got loss '", loss, "'");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "step: label_smoothing must be between 0 and 1, got ",
                    label_smoothing);
  TORCH_CHECK_VALUE(max_norm > 0, "step: max_norm must be positive, got ", max_norm);
  state->label_smoothing = label_smoothing;
  state->ignore_index = ignore_index;
  state->max_norm = max_norm;
  if (generator && generator != Py_None) {
    TORCH_CHECK_TYPE(THPGenerator_Check(generator), "step: generator must be a torch.Generator, got ",
                     Py_TYPE(generator)->tp_name);
    state->generator = THPGenerator_Unwrap(generator);
  }
  TORCH_CHECK_VALUE(narrow || !masters || masters == Py_None, "step: masters are for 16-bit parameters");
  TORCH_CHECK_TYPE(!narrow || !state->drops, "step: dropout must be 0 for bfloat16 parameters");
  const auto is_dict = [](const py::object& object) {
    TORCH_CHECK_TYPE(PyDict_Check(object.ptr()), "step: watched must begin with dicts, got ",
                     Py_TYPE(object.ptr())->tp_name);
    return object;
  };
  if (watched) {
    for (const py::handle entry : sequence(watched)) {
      const py::sequence t = py::reinterpret_borrow<py::sequence>(entry);
      state->watched.push_back({is_dict(t[0]), t[1], t[2]});
    }
  }
  if (sizes) {
    for (const py::handle entry : sequence(sizes)) {
      const py::sequence t = py::reinterpret_borrow<py::sequence>(entry);
      const py::object entries = t[0];
      TORCH_CHECK_TYPE(PyDict_Check(entries.ptr()) || PyList_Check(entries.ptr()),
                       "step: sizes must begin with dicts or lists, got ", Py_TYPE(entries.ptr())->tp_name);
      state->sizes.push_back({entries, py::object(t[1]).cast<Py_ssize_t>()});
    }
  }
  auto* self = reinterpret_cast<StepObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->call = call;
  self->state = state.release();
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* self) {
  delete reinterpret_cast<StepObject*>(self)->state;
  Py_TYPE(self)->tp_free(self);
}

PyObject* get_counts(PyObject* self, void*) {
  py::list list;
  for (const Learned& p : state_of(self).parameters) list.append(p.count);
  return list.release().ptr();
}
int set_steps(PyObject* self, PyObject* value, void*) {
  const long long steps = value ? PyLong_AsLongLong(value) : 0;
  if (steps == -1 && PyErr_Occurred()) return -1;
  state_of(self).steps = steps;
  return 0;
}

PyMethodDef methods[] = {
    {"gradients", gradients, METH_VARARGS, "gradients(x, y, weight=None): the loss and its gradients; no update."},
    {"epoch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(epoch)), METH_VARARGS | METH_KEYWORDS,
     "epoch(X, y, order, batch_size, losses, begin=0, seconds=inf, weight=None, lr=None): the next batch."},
    {"set_input", set_input, METH_VARARGS, "set_input(scale, shift): x is read as x * scale + shift."},
    {"release", release, METH_NOARGS, "release(): gives the workspace back."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef properties[] = {
    {"workspace", [](PyObject* self, void*) { return PyLong_FromSize_t(state_of(self).pool.bytes()); }, nullptr,
     "Bytes of workspace held.", nullptr},
    {"kept", [](PyObject* self, void*) { return PyLong_FromLongLong(state_of(self).kept); }, nullptr,
     "Bytes of activations that the last call kept.", nullptr},
    {"counts", get_counts, nullptr, "Updates of each parameter.", nullptr},
    {"steps", [](PyObject* self, void*) { return PyLong_FromLongLong(state_of(self).steps); }, set_steps,
     "Steps taken.", nullptr},
    {"batches", [](PyObject* self, void*) { return PyLong_FromLongLong(state_of(self).batches); }, nullptr,
     "The next batch of the last epoch.", nullptr},
    {"norm", [](PyObject* self, void*) { return PyFloat_FromDouble(state_of(self).norm); }, nullptr,
     "The gradients' norm in the last step, before clipping.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyTypeObject step_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

bool add_step_type(PyObject* module) {
  py::module_ m = py::reinterpret_borrow<py::module_>(module);
  py::class_<OptimizerInfo>(m, "OptimizerInfo")
      .def_readonly("name", &OptimizerInfo::name)
      .def_readonly("states", &OptimizerInfo::states)
      .def_property_readonly("settings", [](const OptimizerInfo& info) {
        py::list list;
        for (const Setting& setting : info.settings) list.append(py::make_tuple(setting.name, setting.value));
        return list;
      });
  m.def("optimizers", &optimizer_list);
  step_type.tp_name = "pyperc._C.Step";
  step_type.tp_basicsize = sizeof(StepObject);
  step_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  step_type.tp_vectorcall_offset = offsetof(StepObject, call);
  step_type.tp_call = PyVectorcall_Call;
  step_type.tp_new = make;
  step_type.tp_dealloc = destroy;
  step_type.tp_methods = methods;
  step_type.tp_getset = properties;
  step_type.tp_doc = "A training step: loss, gradients and update of a network in one call, step(x, y, weight=None).";
  return PyType_Ready(&step_type) == 0 &&
         PyModule_AddObjectRef(module, "Step", reinterpret_cast<PyObject*>(&step_type)) == 0;
}

}  // namespace pyperc
