// What the files that speak Python's C API know of its objects and of torch's tensors among them. torch's own header
// for these, and pybind11, take longer to compile than those files do, so that of them only python.cpp includes them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>
#include <torch/csrc/python_headers.h>

#include <utility>
#include <vector>

namespace pyperc {

class Chain;

namespace python {

using at::Tensor;

[[noreturn]] void throw_error();  // the one that is set

// A reference to an object, which is given back in the end.
class Object {
 public:
  Object() = default;
  // What the C API returned as a new reference; throws the error that is set where that is null.
  static Object taken(PyObject* reference) {
    if (!reference) throw_error();
    return Object(reference);
  }
  // A reference of its own to an object, or to none.
  static Object shared(PyObject* object) { return Object(Py_XNewRef(object)); }
  Object(const Object& other) : object_(Py_XNewRef(other.object_)) {}
  Object(Object&& other) noexcept : object_(other.release()) {}
  Object& operator=(Object other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Object() { Py_XDECREF(object_); }

  explicit operator bool() const { return object_ != nullptr; }
  bool is_none() const { return object_ == Py_None; }
  PyObject* get() const { return object_; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  explicit Object(PyObject* reference) : object_(reference) {}
  PyObject* object_ = nullptr;
};

// These throw where the object is not of that kind.
size_t length_of(PyObject* sequence);
Object item(PyObject* sequence, size_t index);
template <class F>
void for_each(PyObject* sequence, F f) {
  for (size_t i = 0; i < length_of(sequence); ++i) f(item(sequence, i));
}
void append(PyObject* list, const Object& entry);
int64_t integer_of(PyObject* object);
double number_of(PyObject* object);
bool truth_of(PyObject* object);
std::vector<double> numbers_of(PyObject* sequence);
const Chain& chain_of(PyObject* object);

bool is_tensor(PyObject* object);        // or one of a subclass
bool is_plain_tensor(PyObject* object);  // a Tensor or a Parameter, and nothing beyond it
const Tensor& tensor_of(PyObject* tensor);
Object object_of(Tensor tensor);
bool has_gradient_hooks(PyObject* tensor);  // also those that are called after accumulation

// What the program has asked of torch meanwhile.
bool is_tracing();      // torch.jit.trace
bool is_autocasting();  // torch.autocast("cpu")

// `function` as Python may call it: exceptions become Python's errors, as in torch's own functions.
PyObject* catch_errors(c10::function_ref<PyObject*()> call);
template <auto function>
constexpr auto with_errors = []<class... A>(PyObject* (*)(A...)) {
  return +[](A... arguments) -> PyObject* { return catch_errors([&] { return function(arguments...); }); };
}(function);

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

}  // namespace python
}  // namespace pyperc
