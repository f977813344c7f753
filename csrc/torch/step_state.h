// What a training step keeps from call to call, and what is looked at anew on every call.
#pragma once

#include <ATen/core/Generator.h>

#include <array>
#include <atomic>
#include <limits>
#include <string>
#include <vector>

#include "../cpu/step.h"
#include "keeper.h"
#include "losses.h"
#include "network.h"
#include "optimizers.h"
#include "pool.h"
#include "python.h"

namespace pyperc::train_step {

using python::Object;

// A weight or a bias of the network.
struct Learned {
  Object object;  // the Parameter; none where a layer has no bias
  // In the object, which alone holds it: a reference of C++ would hide the Parameter's hooks and attributes from the
  // garbage collector.
  const Tensor* tensor = nullptr;
  int group = -1;
  bool trained = false;  // when the step was made
  Tensor master;         // of 16 bits: the float32 numbers that it is rounded from
  Tensor state[MAX_STATES];
  Tensor counter;     // the optimizer's own number of updates, where it has one
  int64_t count = 0;  // of updates, where there is no counter

  const Tensor& value() const { return *tensor; }
  bool trains() const { return object && group >= 0 && value().requires_grad(); }
  int64_t updates() const;
  void updated();
};

struct Watched {
  Object dictionary, key, value;
};
struct Sized {
  Object container;  // a dict or a list
  Py_ssize_t size;
  std::vector<Object> entries;  // as they were at first: keys and values, or items
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

  std::atomic<bool> busy = false;
  Pool pool;
  // Other threads may ask for them during a call.
  std::atomic<int64_t> steps = 0, batches = 0, kept = 0;
  std::atomic<double> norm = std::numeric_limits<double>::quiet_NaN();

  size_t depth() const { return chain.size(); }
  int64_t inputs() const { return parameters[0].value().size(1); }
  int64_t outputs() const { return parameters[depth() - 1].value().size(0); }

  template <class F>
  void each_object(F f) const {
    for (const Learned& p : parameters) f(p.object);
    for (const Object& group : groups) f(group);
    for (const Object& key : keys) f(key);
    for (const Watched& w : watched) f(w.dictionary), f(w.key), f(w.value);
    for (const Sized& sized : sizes) {
      f(sized.container);
      for (const Object& entry : sized.entries) f(entry);
    }
  }
};
inline State& state_of(PyObject* self) { return python::kept_by<State>(self); }

// A call's turn, which it takes before it reads or writes anything. Throws while another has it, be that one in this
// thread, running Python code.
class Turn {
 public:
  explicit Turn(State& state) : busy_(state.busy) {
    TORCH_CHECK(!busy_.exchange(true), "step: this step is running in another thread; make one for each thread");
  }
  ~Turn() { busy_.store(false, std::memory_order_release); }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;

 private:
  std::atomic<bool>& busy_;
};

// Calls f with the keys and values of a dict, or the items of a list, until f returns false; whether it never did.
template <class F>
bool all_entries(PyObject* container, F f) {
  if (PyList_Check(container)) {
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(container); ++i) {
      if (!f(PyList_GET_ITEM(container, i))) return false;
    }
    return true;
  }
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(container, &at, &key, &value);) {
    if (!f(key) || !f(value)) return false;
  }
  return true;
}

// Whether it is a number as torch's optimizers count in.
bool is_counter(const Tensor& t);

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

// Parameters and their states may have been given other memory (`.data = `): throws where it no longer fits.
void check_parameters(const State& state);

// Whether the network is still the one that the step was made for, and the step's to compute.
bool unchanged(const State& state);

// The settings of all groups, as the optimizer's dictionaries hold them now.
void read_settings(State& state);

}  // namespace pyperc::train_step
