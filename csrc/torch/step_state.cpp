// What a training step looks at on every call: torch's tensors and dictionaries, hooks and modes.
#include "step_state.h"

#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>

namespace pyperc::train_step {

namespace {

// Whether somebody wants to be shown the operations, or their gradients: autograd has to take the step.
bool is_watched(const State& state) {
  if (c10::impl::TorchDispatchModeTLS::stack_len() > 0 || python::is_tracing() || python::is_autocasting()) {
    return true;
  }
  return std::any_of(state.parameters.begin(), state.parameters.end(),
                     [](const Learned& p) { return p.object && python::has_gradient_hooks(p.object.get()); });
}

double number(PyObject* value, const Setting& setting) {
  if (setting.item >= 0) {
    const Object item = Object::taken(PySequence_GetItem(value, setting.item));
    return number(item.get(), {setting.name, 0});
  }
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  if (value == Py_False) return 0;
  if (value == Py_True) return 1;
  const Object converted = Object::taken(PyNumber_Float(value));
  return PyFloat_AS_DOUBLE(converted.get());
}

}  // namespace

bool is_counter(const Tensor& t) {
  return t.numel() == 1 && t.device().is_cpu() && t.layout() == at::kStrided &&
         (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble);
}

int64_t Learned::updates() const {
  if (!counter.defined()) return count;
  const double number =
      counter.scalar_type() == at::kDouble ? *counter.const_data_ptr<double>() : *counter.const_data_ptr<float>();
  return number >= 0 && number < 0x1p62 ? static_cast<int64_t>(number) : 0;
}

void Learned::updated() {
  if (!counter.defined()) {
    ++count;
  } else if (counter.scalar_type() == at::kDouble) {
    ++*counter.mutable_data_ptr<double>();
  } else {
    ++*counter.mutable_data_ptr<float>();
  }
}

std::string text(at::ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

void check(const Tensor& t, const std::string& name, at::ScalarType dtype, c10::IntArrayRef shape) {
  TORCH_CHECK_TYPE(t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == dtype, "step: ", name,
                   " must be a dense ", text(dtype), " tensor on the CPU, got ", t.toString());
  TORCH_CHECK_VALUE(t.sizes() == shape, "step: ", name, " must be of shape ", shape, ", got ", t.sizes());
  TORCH_CHECK_VALUE(shape.empty() || t.stride(-1) == 1 || t.size(-1) <= 1, "step: ", name,
                    " must have rows of adjacent elements, got strides ", t.strides());
}

int64_t row_stride(const Tensor& t) { return t.dim() == 2 && t.size(0) > 1 ? t.stride(0) : t.size(-1); }

void check_parameters(const State& state) {
  const size_t depth = state.depth();
  int64_t in = -1;
  for (size_t l = 0; l < depth; ++l) {
    const Tensor& w = state.parameters[l].value();
    const Tensor& b = state.parameters[depth + l].value();
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
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const Learned& p = state.parameters[i];
    const Tensor* first = nullptr;
    for (const Tensor& s : p.state) {
      if (!s.defined()) continue;
      if (!first) first = &s;
      const bool good = s.device().is_cpu() && s.layout() == at::kStrided && s.scalar_type() == wide(state.dtype) &&
                        s.sizes() == p.value().sizes() && (s.stride(-1) == 1 || s.size(-1) == 1) &&
                        row_stride(s) == row_stride(*first);
      TORCH_CHECK_VALUE(good, "step: the tensors of state[", i, "] must be dense ", text(wide(state.dtype)),
                        " on the CPU, of shape ", p.value().sizes(), " with rows of adjacent elements, ",
                        "and all of the same strides, got ", s.toString(), " ", s.sizes());
    }
    TORCH_CHECK_VALUE(!p.counter.defined() || is_counter(p.counter), "step: a count must be one number in float32 or ",
                      "float64 on the CPU, got ", p.counter.toString(), " ", p.counter.sizes());
  }
}

bool unchanged(const State& state) {
  for (const Watched& watched : state.watched) {
    PyObject* value = PyDict_GetItemWithError(watched.dictionary.get(), watched.key.get());
    if ((value ? value : Py_None) != watched.value.get()) return false;
  }
  for (const Sized& sized : state.sizes) {
    PyObject* container = sized.container.get();
    if ((PyDict_Check(container) ? PyDict_GET_SIZE(container) : PyList_GET_SIZE(container)) != sized.size) return false;
    if (sized.size == 0) continue;
    auto entry = sized.entries.begin();
    const bool same = all_entries(
        container, [&](PyObject* object) { return entry != sized.entries.end() && (entry++)->get() == object; });
    if (!same || entry != sized.entries.end()) return false;
  }
  // What trains for the first time gets a state from the optimizer.
  const bool begins = std::any_of(state.parameters.begin(), state.parameters.end(),
                                  [](const Learned& p) { return !p.trained && p.trains() && p.updates() == 0; });
  return !begins && !is_watched(state);
}

void read_settings(State& state) {
  const auto& list = optimizer_list()[static_cast<size_t>(state.optimizer)].settings;
  for (size_t g = 0; g < state.groups.size(); ++g) {
    for (size_t i = 0; i < list.size(); ++i) {
      PyObject* value = PyDict_GetItemWithError(state.groups[g].get(), state.keys[i].get());
      state.settings[g][i] = value ? number(value, list[i]) : list[i].value;
    }
  }
}

}  // namespace pyperc::train_step
