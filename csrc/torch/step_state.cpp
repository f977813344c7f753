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

bool unchanged(const State& state) {
  for (const Watched& watched : state.watched) {
    PyObject* value = PyDict_GetItemWithError(watched.dictionary.get(), watched.key.get());
    if ((value ? value : Py_None) != watched.value.get()) return false;
  }
  for (const Sized& sized : state.sizes) {
    PyObject* entries = sized.entries.get();
    if ((PyDict_Check(entries) ? PyDict_GET_SIZE(entries) : PyList_GET_SIZE(entries)) != sized.size) return false;
  }
  return !is_watched(state);
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
