// The per-call check of a fused run of modules, in the C API of Python: in Python itself it costs as much as a small
// network, and a method of pybind11 costs half of that.
#include "run.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "autograd.h"

namespace pyperc {

namespace {

namespace py = pybind11;

// An attribute that must still be the same object.
struct Watched {
  py::object owner, name, value;
};

// A module of the run, as it was when the run was found. `read`, if any, gives what else its result depends on.
struct Member {
  py::object module;
  PyTypeObject* type;
  bool linear;
  py::object read, settings;
};

struct State {
  std::vector<Watched> watched;
  std::vector<py::object> empty;  // dictionaries that must be empty: torch's global hooks
  std::vector<Member> members;
  py::object chain_owner;
  const Chain* chain;
  Py_ssize_t start, count;  // the first member's place in the container, and the container's length
};

struct RunObject {
  PyObject_HEAD vectorcallfunc call;
  State* state;
};

struct Names {
  PyObject* hooks[4] = {PyUnicode_InternFromString("_forward_hooks"), PyUnicode_InternFromString("_forward_pre_hooks"),
                        PyUnicode_InternFromString("_backward_hooks"),
                        PyUnicode_InternFromString("_backward_pre_hooks")};
  PyObject* forward = PyUnicode_InternFromString("forward");
  PyObject* compiled = PyUnicode_InternFromString("_compiled_call_impl");
  PyObject* parameters = PyUnicode_InternFromString("_parameters");
  PyObject* weight = PyUnicode_InternFromString("weight");
  PyObject* bias = PyUnicode_InternFromString("bias");
};
const Names& names() {
  static const Names names;
  return names;
}

bool is_empty(PyObject* dictionary) { return dictionary && PyDict_Check(dictionary) && !PyDict_GET_SIZE(dictionary); }

// Whether the module is still the plain one that it was.
bool unchanged(const Member& member, PyObject* module, PyObject* state) {
  if (module != member.module.ptr() || Py_TYPE(module) != member.type) return false;
  for (PyObject* hooks : names().hooks) {
    if (!is_empty(PyDict_GetItemWithError(state, hooks))) return false;
  }
  if (PyDict_GetItemWithError(state, names().forward) || PyDict_GetItemWithError(state, names().compiled)) return false;
  if (member.read.is_none()) return true;
  const py::object settings = py::reinterpret_steal<py::object>(PyObject_CallOneArg(member.read.ptr(), module));
  if (!settings) throw py::error_already_set();
  return settings.equal(member.settings);
}

// A parameter, or the plain tensor that stands in its place; false where a subclass must be shown the call.
bool append(Tensors& list, PyObject* parameters, PyObject* module, PyObject* name, bool optional) {
  py::object value = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(parameters, name));
  if (!value) value = py::reinterpret_steal<py::object>(PyObject_GetAttr(module, name));
  if (!value) throw py::error_already_set();
  if (optional && value.is_none()) {
    list.emplace_back();
    return true;
  }
  if (!THPVariable_CheckExact(value.ptr())) return false;
  list.push_back(THPVariable_Unpack(value.ptr()));
  return true;
}

bool is_watched() {
  return at::impl::torch_function_mode_enabled() || c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         torch::jit::tracer::isTracing();
}

// Fills the operands; false where the run is another one by now, or somebody wants to be shown its calls.
bool gather(const State& state, PyObject* modules, Tensors& weights, Tensors& biases) {
  if (is_watched() || PyDict_GET_SIZE(modules) != state.count) return false;
  for (const Watched& watched : state.watched) {
    const py::object now = py::reinterpret_steal<py::object>(PyObject_GetAttr(watched.owner.ptr(), watched.name.ptr()));
    if (!now) throw py::error_already_set();
    if (!now.is(watched.value)) return false;
  }
  for (const py::object& dictionary : state.empty) {
    if (!is_empty(dictionary.ptr())) return false;
  }
  Py_ssize_t position = 0, index = -state.start;
  PyObject *key = nullptr, *module = nullptr;
  while (index < static_cast<Py_ssize_t>(state.members.size()) && PyDict_Next(modules, &position, &key, &module)) {
    if (index++ < 0) continue;
    const Member& member = state.members[static_cast<size_t>(index - 1)];
    const py::object dictionary = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dictionary) throw py::error_already_set();
    if (!unchanged(member, module, dictionary.ptr())) return false;
    if (!member.linear) continue;
    PyObject* parameters = PyDict_GetItemWithError(dictionary.ptr(), names().parameters);
    if (!parameters || !PyDict_Check(parameters)) return false;
    if (!append(weights, parameters, module, names().weight, false)) return false;
    if (!append(biases, parameters, module, names().bias, true)) return false;
  }
  return true;
}

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  HANDLE_TH_ERRORS
  if (PyVectorcall_NARGS(flags) != 2 || keywords || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "Run: expected a dict of modules and the input");
    return nullptr;
  }
  const State& state = *reinterpret_cast<RunObject*>(self)->state;
  PyObject* x = args[1];
  if (!THPVariable_CheckExact(x)) Py_RETURN_NONE;
  Tensors weights, biases;
  weights.reserve(state.members.size());
  biases.reserve(state.members.size());
  if (!gather(state, args[0], weights, biases)) Py_RETURN_NONE;
  const Tensor& input = THPVariable_Unpack(x);
  Tensor y;
  {
    const py::gil_scoped_release unlocked;
    y = mlp(input, {weights, biases, *state.chain});
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

py::tuple tuple_at(const py::tuple& list, size_t i) { return list[i].cast<py::tuple>(); }

// Run(watched, empty, members, chain, start, count)
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject *watched, *empty, *members, *chain;
  Py_ssize_t start, count;
  if (!PyArg_ParseTuple(args, "O!O!O!Onn", &PyTuple_Type, &watched, &PyTuple_Type, &empty, &PyTuple_Type, &members,
                        &chain, &start, &count)) {
    return nullptr;
  }
  auto state = std::make_unique<State>();
  const auto watched_list = py::reinterpret_borrow<py::tuple>(watched);
  for (size_t i = 0; i < watched_list.size(); ++i) {
    const py::tuple t = tuple_at(watched_list, i);
    state->watched.push_back({t[0], t[1], t[2]});
  }
  for (const py::handle dictionary : py::reinterpret_borrow<py::tuple>(empty)) {
    state->empty.push_back(py::reinterpret_borrow<py::object>(dictionary));
  }
  const auto member_list = py::reinterpret_borrow<py::tuple>(members);
  for (size_t i = 0; i < member_list.size(); ++i) {
    const py::tuple t = tuple_at(member_list, i);
    const py::object module = t[0];
    state->members.push_back({module, Py_TYPE(module.ptr()), t[1].cast<bool>(), t[2], t[3]});
  }
  state->chain_owner = py::reinterpret_borrow<py::object>(chain);
  state->chain = py::cast<const Chain*>(state->chain_owner);
  state->start = start;
  state->count = count;
  auto* self = reinterpret_cast<RunObject*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->call = call;
  self->state = state.release();
  return reinterpret_cast<PyObject*>(self);
  END_HANDLE_TH_ERRORS
}

void destroy(PyObject* self) {
  delete reinterpret_cast<RunObject*>(self)->state;
  Py_TYPE(self)->tp_free(self);
}

PyTypeObject run_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

bool add_run_type(PyObject* module) {
  run_type.tp_name = "pyperc._C.Run";
  run_type.tp_basicsize = sizeof(RunObject);
  run_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
  run_type.tp_vectorcall_offset = offsetof(RunObject, call);
  run_type.tp_call = PyVectorcall_Call;
  run_type.tp_new = make;
  run_type.tp_dealloc = destroy;
  run_type.tp_doc = "A fused run of modules: Run(watched, empty, members, chain, start, count)(modules, x).";
  return PyType_Ready(&run_type) == 0 &&
         PyModule_AddObjectRef(module, "Run", reinterpret_cast<PyObject*>(&run_type)) == 0;
}

}  // namespace pyperc
