// What a training step keeps from call to call, and what is looked at anew on every call.
#pragma once

#include <ATen/core/Generator.h>

#include <array>
#include <limits>
#include <mutex>
#include <string>
#include <vector>

#include "../cpu/step.h"
#include "losses.h"
#include "network.h"
#include "optimizers.h"
#include "pool.h"
#include "python.h"

namespace pyperc::train_step {

using python::Object;

// A weight or a bias of the network.
struct Learned {
  Object object;
  Tensor value;
  int group = -1;
  Tensor master;  // of 16 bits: the float32 numbers that it is rounded from
  Tensor state[MAX_STATES];
  int64_t count = 0;
  bool trains() const { return value.defined() && group >= 0 && value.requires_grad(); }
};

struct Watched {
  Object dictionary, key, value;
};
struct Sized {
  Object entries;  // a dict or a list
  Py_ssize_t size;
};

using Settings = std::array<double, MAX_SETTINGS>;

struct State {
  at::ScalarType dtype;
  std::vector<Learned> parameters;  // weights, then biases
  Chain chain{{}, {}};
  std::vector<double> dropout;
  bool drops = false;
  LossChoice loss{"mse", {}};
  Reduction reduction = Reduction::Mean;
  Tensor class_weight;
  double label_smoothing = 0;
  int64_t ignore_index = -100;
  Optimizer optimizer = Optimizer::Sgd;
  std::vector<Object> groups;
  std::vector<Object> keys;  // of the settings, in their order
  std::vector<Settings> settings;
  double max_norm = std::numeric_limits<double>::infinity();
  OnNan on_nan = OnNan::Stop;
  at::Generator generator;
  std::vector<Watched> watched;
  std::vector<Sized> sizes;
  Tensor scale, shift;

  std::mutex busy;  // one step at a time
  Pool pool;
  int64_t steps = 0, batches = 0, kept = 0;
  double norm = std::numeric_limits<double>::quiet_NaN();

  size_t depth() const { return chain.size(); }
  int64_t inputs() const { return parameters[0].value.size(1); }
  int64_t outputs() const { return parameters[depth() - 1].value.size(0); }
};

struct StepObject {
  PyObject_HEAD vectorcallfunc call;
  State* state;
};
inline State& state_of(PyObject* self) { return *reinterpret_cast<StepObject*>(self)->state; }

template <class F>
auto with_dtype(at::ScalarType dtype, F f) {
  return dtype == at::kFloat ? f(0.0f) : dtype == at::kDouble ? f(0.0) : f(BFloat16{});
}

std::string text(at::ScalarType dtype);

// What a network's loss and its parameters' states are in.
inline at::ScalarType wide(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// Throws unless t is what the kernels read in place or write: dense, on the CPU, of that dtype and shape, rows of
// adjacent elements.
void check(const Tensor& t, const std::string& name, at::ScalarType dtype, c10::IntArrayRef shape);

int64_t row_stride(const Tensor& t);

// Parameters may have been given other memory (`.data = `): throws where their shapes no longer fit.
void check_parameters(const State& state);

// Whether the network is still the one that the step was made for, and the step's to compute.
bool unchanged(const State& state);

// The settings of all groups, as the optimizer's dictionaries hold them now.
void read_settings(State& state);

}  // namespace pyperc::train_step
