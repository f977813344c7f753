// Of the files that speak Python's C API the one that includes torch's header for tensors, and pybind11.
#include "python.h"

#include <ATen/autocast_mode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>
#include <torch/csrc/utils/pybind.h>

#include "network.h"

namespace pyperc::python {

namespace py = pybind11;

void throw_error() { throw py::error_already_set(); }

size_t length_of(PyObject* sequence) { return py::len(py::handle(sequence)); }
Object item(PyObject* sequence, size_t index) {
  return Object::taken(PySequence_GetItem(sequence, static_cast<Py_ssize_t>(index)));
}
void append(PyObject* list, const Object& entry) {
  if (PyList_Append(list, entry.get()) < 0) throw_error();
}
int64_t integer_of(PyObject* object) { return py::handle(object).cast<int64_t>(); }
double number_of(PyObject* object) { return py::handle(object).cast<double>(); }
std::vector<double> numbers_of(PyObject* sequence) {
  std::vector<double> numbers(length_of(sequence));
  for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = number_of(item(sequence, i).get());
  return numbers;
}
bool truth_of(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw_error();
  return truth;
}
const Chain& chain_of(PyObject* object) { return py::handle(object).cast<const Chain&>(); }

bool is_tensor(PyObject* object) { return THPVariable_Check(object); }
bool is_plain_tensor(PyObject* object) { return THPVariable_CheckExact(object); }
const Tensor& tensor_of(PyObject* tensor) { return THPVariable_Unpack(tensor); }
Object object_of(Tensor tensor) { return Object::taken(THPVariable_Wrap(std::move(tensor))); }

bool has_gradient_hooks(PyObject* tensor) {
  const auto hung = [](PyObject* hooks) { return hooks && PyDict_Check(hooks) && PyDict_GET_SIZE(hooks) > 0; };
  const auto* object = reinterpret_cast<const THPVariable*>(tensor);
  return hung(object->backward_hooks) || hung(object->post_accumulate_grad_hooks);
}

bool is_tracing() { return torch::jit::tracer::isTracing(); }
bool is_autocasting() { return at::autocast::is_autocast_enabled(at::kCPU); }

PyObject* catch_errors(c10::function_ref<PyObject*()> call) {
  HANDLE_TH_ERRORS
  return call();
  END_HANDLE_TH_ERRORS
}

}  // namespace pyperc::python
