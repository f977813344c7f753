// The per-call check of a fused run of modules, in the C API of Python: in Python itself it costs as much as a small
// network, and a method of pybind11 costs half of that.
#include "run.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <memory>

#include "autograd.h"
#include "keeper.h"

namespace pyperc {

namespace {

using python::Object;

// An attribute that must still be the same object.
struct Watched {
  Object owner, name, value;
};

// A module of the run, as it was when the run was found. `read`, if any, gives what else its result depends on.
struct Member {
  Object module;
  PyTypeObject* type;
  bool linear;
  Object read, settings;
};

struct State {
  std::vector<Watched> watched;
  std::vector<Object> empty;  // dictionaries that must be empty: torch's global hooks
  std::vector<Member> members;
  Object chain_owner;
  const Chain* chain;
  Py_ssize_t start, count;  // the first member's place in the container, and the container's length

  template <class F>
  void each_object(F f) const {
    for (const Watched& w : watched) f(w.owner), f(w.name), f(w.value);
    for (const Object& dictionary : empty) f(dictionary);
    for (const Member& m : members) f(m.module), f(m.read), f(m.settings);
    f(chain_owner);
  }
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
  if (module != member.module.get() || Py_TYPE(module) != member.type) return false;
  for (PyObject* hooks : names().hooks) {
    if (!is_empty(PyDict_GetItemWithError(state, hooks))) return false;
  }
  if (PyDict_GetItemWithError(state, names().forward) || PyDict_GetItemWithError(state, names().compiled)) return false;
  if (member.read.is_none()) return true;
  const Object settings = Object::taken(PyObject_CallOneArg(member.read.get(), module));
  const int equal = PyObject_RichCompareBool(settings.get(), member.settings.get(), Py_EQ);
  if (equal < 0) python::throw_error();
  return equal;
}

// A parameter, or the plain tensor that stands in its place; false where a subclass must be shown the call.
bool append(Tensors& list, PyObject* parameters, PyObject* module, PyObject* name, bool optional) {
  Object value = Object::shared(PyDict_GetItemWithError(parameters, name));
  if (!value) value = Object::taken(PyObject_GetAttr(module, name));
  if (optional && value.is_none()) {
    list.emplace_back();
    return true;
  }
  if (!python::is_plain_tensor(value.get())) return false;
  list.push_back(python::tensor_of(value.get()));
  return true;
}

bool is_watched() {
  return at::impl::torch_function_mode_enabled() || c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         python::is_tracing();
}

// Fills the operands; false where the run is another one by now, or somebody wants to be shown its calls.
bool gather(const State& state, PyObject* modules, Tensors& weights, Tensors& biases) {
  if (is_watched() || PyDict_GET_SIZE(modules) != state.count) return false;
  for (const Watched& watched : state.watched) {
    const Object now = Object::taken(PyObject_GetAttr(watched.owner.get(), watched.name.get()));
    if (now.get() != watched.value.get()) return false;
  }
  for (const Object& dictionary : state.empty) {
    if (!is_empty(dictionary.get())) return false;
  }
  Py_ssize_t position = 0, index = -state.start;
  PyObject *key = nullptr, *module = nullptr;
  while (index < static_cast<Py_ssize_t>(state.members.size()) && PyDict_Next(modules, &position, &key, &module)) {
    if (index++ < 0) continue;
    const Member& member = state.members[static_cast<size_t>(index - 1)];
    const Object dictionary = Object::taken(PyObject_GenericGetDict(module, nullptr));
    if (!unchanged(member, module, dictionary.get())) return false;
    if (!member.linear) continue;
    PyObject* parameters = PyDict_GetItemWithError(dictionary.get(), names().parameters);
    if (!parameters || !PyDict_Check(parameters)) return false;
    if (!append(weights, parameters, module, names().weight, false)) return false;
    if (!append(biases, parameters, module, names().bias, true)) return false;
  }
  return true;
}

PyObject* call(PyObject* self, PyObject* const* args, size_t flags, PyObject* keywords) {
  if (PyVectorcall_NARGS(flags) != 2 || keywords || !PyDict_Check(args[0])) {
    PyErr_SetString(PyExc_TypeError, "Run: expected a dict of modules and the input");
    return nullptr;
  }
  const State& state = python::kept_by<State>(self);
  PyObject* x = args[1];
  if (!python::is_plain_tensor(x)) Py_RETURN_NONE;
  Tensors weights, biases;
  weights.reserve(state.members.size());
  biases.reserve(state.members.size());
  if (!gather(state, args[0], weights, biases)) Py_RETURN_NONE;
  const Tensor& input = python::tensor_of(x);
  Tensor y;
  {
    const python::Unlocked unlocked;
    y = mlp(input, {weights, biases, *state.chain});
  }
  return python::object_of(std::move(y)).release();
}

// Run(watched, empty, members, chain, start, count)
PyObject* make(PyTypeObject* type, PyObject* args, PyObject*) {
  PyObject *watched, *empty, *members, *chain;
  Py_ssize_t start, count;
  if (!PyArg_ParseTuple(args, "O!O!O!Onn", &PyTuple_Type, &watched, &PyTuple_Type, &empty, &PyTuple_Type, &members,
                        &chain, &start, &count)) {
    return nullptr;
  }
  auto state = std::make_unique<State>();
  python::for_each(watched, [&](const Object& entry) {
    const auto at = [&](size_t i) { return python::item(entry.get(), i); };
    state->watched.push_back({at(0), at(1), at(2)});
  });
  python::for_each(empty, [&](const Object& dictionary) { state->empty.push_back(dictionary); });
  python::for_each(members, [&](const Object& entry) {
    const auto at = [&](size_t i) { return python::item(entry.get(), i); };
    const Object module = at(0);
    state->members.push_back({module, Py_TYPE(module.get()), python::truth_of(at(1).get()), at(2), at(3)});
  });
  state->chain_owner = Object::shared(chain);
  state->chain = &python::chain_of(chain);
  state->start = start;
  state->count = count;
  return python::keep(type, python::with_errors<call>, std::move(state));
}

PyTypeObject run_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

bool add_run_type(PyObject* module) {
  python::make_keeper<State>(run_type, "pyperc._C.Run");
  run_type.tp_new = python::with_errors<make>;
  run_type.tp_doc = "A fused run of modules: Run(watched, empty, members, chain, start, count)(modules, x).";
  return PyType_Ready(&run_type) == 0 &&
         PyModule_AddObjectRef(module, "Run", reinterpret_cast<PyObject*>(&run_type)) == 0;
}

}  // namespace pyperc
