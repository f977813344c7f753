// The training step as a Python type: its methods and properties.
#include "step.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <mutex>

#include "step_arguments.h"
#include "step_call.h"
#include "step_new.h"

namespace pyperc {

using namespace train_step;

namespace {

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

PyObject* make(PyTypeObject* type, PyObject* args, PyObject* keywords) {
  HANDLE_TH_ERRORS
  std::unique_ptr<State> state = new_state(args, keywords);
  if (!state) return nullptr;
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
