// What a call of a training step is given, checked and made readable to the kernels.
#include "step_arguments.h"

#include <algorithm>

namespace pyperc::train_step {

namespace {

Stored stored_as(const State& state, at::ScalarType dtype) {
  if (dtype == state.dtype && dtype == at::kBFloat16) return Stored::BFloat16;
  switch (dtype) {
    case at::kFloat: return Stored::Float32;
    case at::kDouble: return Stored::Float64;
    case at::kByte: return Stored::UInt8;
    default:
      TORCH_CHECK_TYPE(false, "step: x must have the network's dtype, or be float32, float64 or uint8, got ",
                       text(dtype));
  }
}

}  // namespace

const Tensor& tensor(PyObject* object, const char* name) {
  TORCH_CHECK_TYPE(python::is_plain_tensor(object), "step: ", name, " must be a torch.Tensor, got ",
                   Py_TYPE(object)->tp_name);
  return python::tensor_of(object);
}

Arguments arguments_of(const State& state, PyObject* x, PyObject* y, PyObject* weight) {
  Arguments a{tensor(x, "x"), tensor(y, "y"), {}};
  const int64_t in = state.inputs(), out = state.outputs();
  TORCH_CHECK_TYPE(a.x.device().is_cpu() && a.x.layout() == at::kStrided, "step: x must be a dense tensor on the CPU, ",
                   "got ", a.x.toString());
  stored_as(state, a.x.scalar_type());
  TORCH_CHECK_VALUE(a.x.dim() >= 1 && a.x.size(-1) == in, "step: x must be [..., ", in, "], got ", a.x.sizes());
  if (a.x.is_neg()) a.x = a.x.resolve_neg();
  const int64_t dims = a.x.dim();
  const c10::IntArrayRef lead = a.x.sizes().slice(0, static_cast<size_t>(dims - 1));
  const int64_t batch = dims == 2 ? a.x.size(0) : a.x.numel() / std::max<int64_t>(1, in);
  TORCH_CHECK_TYPE(a.y.device().is_cpu() && a.y.layout() == at::kStrided, "step: y must be a dense tensor on the CPU, ",
                   "got ", a.y.toString());
  if (state.loss.over() == LossOver::Row) {
    if (a.y.scalar_type() == at::kLong) {
      TORCH_CHECK_VALUE(a.y.sizes() == lead, "step: y must be int64 of shape ", lead,
                        ", or the classes' probabilities, got ", a.y.sizes());
    } else {
      a.probabilities = true;
      TORCH_CHECK_TYPE(a.y.scalar_type() == state.dtype, "step: y must be int64, or the classes' probabilities in ",
                       text(state.dtype), ", got ", text(a.y.scalar_type()));
    }
  } else {
    TORCH_CHECK_TYPE(a.y.scalar_type() == state.dtype, "step: y must have the network's dtype ", text(state.dtype),
                     ", got ", text(a.y.scalar_type()));
  }
  if (a.y.scalar_type() == state.dtype) {
    TORCH_CHECK_VALUE(
        a.y.dim() == dims && a.y.size(-1) == out && a.y.sizes().slice(0, static_cast<size_t>(dims - 1)) == lead,
        "step: y must be of shape ", lead, " + [", out, "], got ", a.y.sizes());
  }
  if (weight && weight != Py_None) {
    a.weight = tensor(weight, "weight").contiguous();
    check(a.weight, "weight", state.dtype, lead);
  }
  if (dims != 2) {
    a.y = a.y.scalar_type() == state.dtype ? a.y.reshape({batch, out}) : a.y.reshape({batch});
    if (a.weight.defined()) a.weight = a.weight.reshape({batch});
    a.x = a.x.reshape({batch, in});
  }
  if (a.y.is_neg()) a.y = a.y.resolve_neg();
  if (!a.y.is_contiguous() && !(a.y.dim() == 2 && a.y.stride(1) == 1)) a.y = a.y.contiguous();
  return a;
}

template <class S>
Batch<S> batch_of(const State& state, Arguments& a) {
  const int64_t rows = a.x.size(0), in = a.x.size(1);
  Batch<S> batch;
  batch.size = batch.rows = rows;
  batch.stored = stored_as(state, a.x.scalar_type());
  if (state.scale.defined()) {
    batch.scale = state.scale.const_data_ptr<Wide<S>>();
    batch.shift = state.shift.const_data_ptr<Wide<S>>();
  }
  // Other strides than unit ones are for what is read in place.
  if (a.x.stride(1) != 1 && in > 1 && (a.x.scalar_type() != state.dtype || batch.scale)) a.x = a.x.contiguous();
  batch.x = a.x.const_data_ptr();
  batch.rs = rows > 1 ? a.x.stride(0) : in;
  batch.cs = in > 1 ? a.x.stride(1) : 1;
  if (a.y.scalar_type() == at::kLong) {
    batch.target = a.y.const_data_ptr<int64_t>();
  } else {
    batch.y = static_cast<const S*>(a.y.const_data_ptr());
    batch.ld_y = row_stride(a.y);
  }
  if (a.weight.defined()) batch.weight = static_cast<const S*>(a.weight.const_data_ptr());
  return batch;
}

template Batch<float> batch_of<float>(const State&, Arguments&);
template Batch<double> batch_of<double>(const State&, Arguments&);
template Batch<BFloat16> batch_of<BFloat16>(const State&, Arguments&);

}  // namespace pyperc::train_step
