// A Python object that keeps what a struct of C++ holds, and that the garbage collector sees through: what it keeps may
// lead back to it.
#pragma once

#include <c10/util/Exception.h>

#include <memory>

#include "python.h"

namespace pyperc::python {

template <class State>
struct Keeper {
  PyObject_HEAD vectorcallfunc call;
  State* state;  // null before it is made, and once the collector has taken it
};

template <class State>
State& kept_by(PyObject* self) {
  State* state = reinterpret_cast<Keeper<State>*>(self)->state;
  TORCH_CHECK(state, Py_TYPE(self)->tp_name, ": it is no more, a cycle that it was part of has been collected");
  return *state;
}

template <class State>
PyObject* keep(PyTypeObject* type, vectorcallfunc call, std::unique_ptr<State> state) {
  auto* self = reinterpret_cast<Keeper<State>*>(type->tp_alloc(type, 0));
  if (!self) return nullptr;
  self->call = call;
  self->state = state.release();
  return reinterpret_cast<PyObject*>(self);
}

// The type, but for its methods. State::each_object(f) calls f with each Object that a state holds. When the collector
// takes a state no call is running, as callers hold the object that they call.
template <class State>
void make_keeper(PyTypeObject& type, const char* name) {
  type.tp_name = name;
  type.tp_basicsize = sizeof(Keeper<State>);
  type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_HAVE_GC;
  type.tp_vectorcall_offset = offsetof(Keeper<State>, call);
  type.tp_call = PyVectorcall_Call;
  type.tp_traverse = [](PyObject* self, visitproc visit, void* argument) {
    const State* state = reinterpret_cast<Keeper<State>*>(self)->state;
    int result = 0;
    if (state) {
      state->each_object([&](const Object& object) {
        if (object && result == 0) result = visit(object.get(), argument);
      });
    }
    return result;
  };
  // Out of reach first: what goes may run Python code.
  type.tp_clear = [](PyObject* self) {
    delete std::exchange(reinterpret_cast<Keeper<State>*>(self)->state, nullptr);
    return 0;
  };
  type.tp_dealloc = [](PyObject* self) {
    PyObject_GC_UnTrack(self);
    Py_TYPE(self)->tp_clear(self);
    Py_TYPE(self)->tp_free(self);
  };
  type.tp_free = PyObject_GC_Del;
}

}  // namespace pyperc::python
