// The training step as a Python type: its methods and properties.
#include "step.h"

#include <ATen/EmptyTensor.h>

#include <memory>

#include "step_arguments.h"
#include "step_call.h"
#include "step_new.h"

namespace pyperc {

using namespace train_step;

namespace {

// A number for each input feature.
Tensor per_feature(const State& state, PyObject* value, const char* name) {
  const int64_t in = state.inputs();
  if (python::is_tensor(value)) {
    const Tensor t = tensor(value, name).to(wide(state.dtype));
    check(t, name, wide(state.dtype), {in});
    return t.contiguous();
  }
  const double number = PyFloat_AsDouble(value);
  if (number == -1 && PyErr_Occurred()) python::throw_error();
  const Tensor t = at::detail::empty_cpu({in}, wide(state.dtype));
  t.fill_(number);
  return t;
}

PyObject* set_input(PyObject* self, PyObject* args) {
  PyObject *scale, *shift;
  if (!PyArg_ParseTuple(args, "OO", &scale, &shift)) return nullptr;
  State& state = state_of(self);
  const Turn turn(state);
  const Tensor a = per_feature(state, scale, "scale"), b = per_feature(state, shift, "shift");
  const bool plain =
      PyFloat_Check(scale) && PyFloat_Check(shift) && PyFloat_AS_DOUBLE(scale) == 1 && PyFloat_AS_DOUBLE(shift) == 0;
  state.scale = plain ? Tensor() : a;
  state.shift = plain ? Tensor() : b;
  Py_RETURN_NONE;
}

PyObject* release(PyObject* self, PyObject*) {
  State& state = state_of(self);
  const Turn turn(state);
  state.pool.release();
  Py_RETURN_NONE;
}

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  std::unique_ptr<State> state = new_state(args, keywords);
  if (!state) return nullptr;
  return python::keep(type, python::with_errors<call>, std::move(state));
}

PyObject* counts(PyObject* self, void*) {
  Object list = Object::taken(PyList_New(0));
  for (const Learned& p : state_of(self).parameters) {
    python::append(list.get(), Object::taken(PyLong_FromLongLong(p.updates())));
  }
  return list.release();
}
int set_steps(PyObject* self, PyObject* value, void*) {
  const long long steps = value ? PyLong_AsLongLong(value) : 0;
  if (steps == -1 && PyErr_Occurred()) return -1;
  const auto write = [&] {
    State& state = state_of(self);
    const Turn turn(state);
    state.steps = steps;
    return Py_None;
  };
  return python::catch_errors(write) ? 0 : -1;
}
PyObject* workspace(PyObject* self, void*) { return PyLong_FromSize_t(state_of(self).pool.bytes()); }
PyObject* norm(PyObject* self, void*) { return PyFloat_FromDouble(state_of(self).norm); }
template <auto number>
PyObject* integer(PyObject* self, void*) {
  return PyLong_FromLongLong(state_of(self).*number);
}

PyMethodDef methods[] = {
    {"gradients", python::with_errors<gradients>, METH_VARARGS,
     "gradients(x, y, weight=None): the loss and its gradients; no update."},
    {"epoch", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(python::with_errors<epoch>)),
     METH_VARARGS | METH_KEYWORDS,
     "epoch(X, y, order, batch_size, losses, begin=0, seconds=inf, weight=None, lr=None): the next batch."},
    {"set_input", python::with_errors<set_input>, METH_VARARGS,
     "set_input(scale, shift): x is read as x * scale + shift."},
    {"release", python::with_errors<release>, METH_NOARGS, "release(): gives the workspace back."},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef properties[] = {
    {"workspace", python::with_errors<workspace>, nullptr, "Bytes of workspace held.", nullptr},
    {"kept", python::with_errors<integer<&State::kept>>, nullptr, "Bytes of activations that the last call kept.",
     nullptr},
    {"counts", python::with_errors<counts>, nullptr, "Updates of each parameter.", nullptr},
    {"steps", python::with_errors<integer<&State::steps>>, set_steps, "Steps taken.", nullptr},
    {"batches", python::with_errors<integer<&State::batches>>, nullptr, "The next batch of the last epoch.", nullptr},
    {"norm", python::with_errors<norm>, nullptr, "The gradients' norm in the last step, before clipping.", nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyTypeObject step_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

bool add_step_type(PyObject* module) {
  python::make_keeper<State>(step_type, "pyperc._C.Step");
  step_type.tp_new = python::with_errors<make>;
  step_type.tp_methods = methods;
  step_type.tp_getset = properties;
  step_type.tp_doc = "A training step: loss, gradients and update of a network in one call, step(x, y, weight=None).";
  return PyType_Ready(&step_type) == 0 &&
         PyModule_AddObjectRef(module, "Step", reinterpret_cast<PyObject*>(&step_type)) == 0;
}

}  // namespace pyperc
