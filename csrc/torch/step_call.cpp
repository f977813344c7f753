// The calls of a training step, in the C API of Python for the sake of small networks.
#include "step_call.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

#include "../cpu/dispatch.h"
#include "step_arguments.h"
#include "threads.h"

namespace pyperc::train_step {

namespace {

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
      if (!p.value().defined()) continue;
      Trained<S>& w = i == l ? layer.w : layer.b;
      w.data = static_cast<S*>(p.value().mutable_data_ptr());
      w.ld = row_stride(p.value());
      if (!p.trains()) continue;
      if (gradients) {
        w.gradient = static_cast<S*>((*gradients)[i].mutable_data_ptr());
        continue;
      }
      if (p.master.defined()) w.master = static_cast<Wide<S>*>(p.master.mutable_data_ptr());
      w.settings = state.settings[static_cast<size_t>(p.group)].data();
      w.count = p.updates() + 1;
      const int live = live_states(state.optimizer, w.settings);
      for (int s = 0; s < live; ++s) {
        TORCH_CHECK_VALUE(p.state[s].defined(), "step: state of parameter ", i, " must hold ",
                          optimizer_list()[static_cast<size_t>(state.optimizer)].states[static_cast<size_t>(s)],
                          ", which the settings of its group ask for");
        w.state[s] = static_cast<Wide<S>*>(p.state[s].mutable_data_ptr());
        w.ld_state = row_stride(p.state[s]);
      }
    }
    layer.spec = {state.parameters[l].value().size(1), state.parameters[l].value().size(0), state.chain[l].activation,
                  state.chain[l].parameters};
  }
  return layers;
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
  state.kept.store(result.kept, std::memory_order_relaxed);
  if (std::isfinite(step.max_norm)) state.norm = result.norm;  // gradients alone leave that of the last step
  return result;
}

void count(State& state) {
  ++state.steps;
  for (Learned& p : state.parameters) {
    if (p.trains()) p.updated();
  }
}

void bump_version(const Tensor& t) {
  if (t.defined() && !t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
}

void bump_versions(State& state) {
  for (Learned& p : state.parameters) {
    if (!p.trains()) continue;
    bump_version(p.value());
    bump_version(p.master);
    for (const Tensor& s : p.state) bump_version(s);
  }
}

void raise(const State& state, const StepResult& result) {
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
  python::throw_error();
}

Object loss_of(const State& state, const StepResult& result) {
  const Tensor loss = at::detail::empty_cpu({}, wide(state.dtype));
  if (loss.scalar_type() == at::kDouble) {
    *loss.mutable_data_ptr<double>() = result.loss;
  } else {
    *loss.mutable_data_ptr<float>() = static_cast<float>(result.loss);
  }
  return python::object_of(loss);
}

StepResult one_step(State& state, Arguments& arguments, const Tensors* gradients) {
  check_parameters(state);
  return with_dtype(state.dtype, [&](auto zero) {
    using S = decltype(zero);
    const std::vector<StepLayer<S>> layers = layers_of<S>(state, gradients);
    const Batch<S> batch = batch_of<S>(state, arguments);
    Step<S> step = step_of(state, batch, layers);
    if (gradients) step.on_nan = OnNan::Ignore, step.max_norm = std::numeric_limits<double>::infinity();
    const python::Unlocked unlocked;
    step.seed = draw(state);
    return run(state, step);
  });
}

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  const Py_ssize_t given = PyVectorcall_NARGS(flags);
  if (given < 2 || given > 3 || keywords) {
    PyErr_SetString(PyExc_TypeError, "Step: expected x, y and perhaps weight, by position");
    return nullptr;
  }
  State& state = state_of(self);
  const Turn turn(state);
  if (!unchanged(state)) Py_RETURN_NONE;
  read_settings(state);
  Arguments arguments = arguments_of(state, args[0], args[1], given > 2 ? args[2] : nullptr);
  const StepResult result = one_step(state, arguments, nullptr);
  if (result.outcome != Outcome::Done) raise(state, result);
  count(state);
  bump_versions(state);
  return loss_of(state, result).release();
}

PyObject* gradients(PyObject* self, PyObject* args) {
  PyObject *x, *y, *weight = nullptr;
  if (!PyArg_ParseTuple(args, "OO|O", &x, &y, &weight)) return nullptr;
  State& state = state_of(self);
  const Turn turn(state);
  const Object found = Object::taken(PyList_New(0));
  if (!unchanged(state)) return PyTuple_Pack(2, Py_None, found.get());
  Arguments arguments = arguments_of(state, x, y, weight);
  Tensors list;
  for (const Learned& p : state.parameters) {
    list.push_back(p.trains() ? at::detail::empty_cpu(p.value().sizes(), state.dtype) : Tensor());
  }
  const StepResult result = one_step(state, arguments, &list);
  if (result.outcome != Outcome::Done) raise(state, result);
  for (const Tensor& t : list) {
    python::append(found.get(), t.defined() ? python::object_of(t) : Object::shared(Py_None));
  }
  return PyTuple_Pack(2, loss_of(state, result).get(), found.get());
}

PyObject* epoch(PyObject* self, PyObject* args, PyObject* keywords) {
  static const char* names[] = {"X", "y", "order", "batch_size", "losses", "begin", "seconds", "weight", "lr", nullptr};
  PyObject *x, *y, *order_object, *losses_object, *weight = nullptr, *lr_object = nullptr;
  Py_ssize_t batch_size, begin = 0;
  double seconds = std::numeric_limits<double>::infinity();
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOnO|ndOO", const_cast<char**>(names), &x, &y, &order_object,
                                   &batch_size, &losses_object, &begin, &seconds, &weight, &lr_object)) {
    return nullptr;
  }
  State& state = state_of(self);
  const Turn turn(state);
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
    const python::Unlocked unlocked;
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
  if (result.outcome == Outcome::WrongTarget && order.defined()) {
    const int64_t row = order.const_data_ptr<int64_t>()[state.batches * batch_size + result.row];
    TORCH_CHECK_INDEX(row >= 0 && row < arguments.x.size(0), "step: order must hold rows from 0 to ",
                      arguments.x.size(0) - 1, ", got ", row, " for row ", result.row, " of the batch");
  }
  if (result.outcome != Outcome::Done) raise(state, result);
  return PyLong_FromLongLong(state.batches);
}

}  // namespace pyperc::train_step
