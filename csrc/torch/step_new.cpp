// A training step as it is made: the arguments of its Python type, read and checked.
#include "step_new.h"

#include <torch/csrc/Generator.h>

#include "step_arguments.h"

namespace pyperc::train_step {

namespace {

Tensor optional_tensor(PyObject* object, const char* name) {
  return object == nullptr || object == Py_None ? Tensor() : tensor(object, name);
}

void check_layers(const State& state) {
  check_parameters(state);
  TORCH_CHECK_VALUE(state.chain.fusible(),
                    "step: an activation has parameters with which its derivative cannot be read ", "from its output");
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const Tensor& a = state.parameters[i].value();
    if (!a.defined() || a.numel() == 0) continue;
    for (size_t j = 0; j < i; ++j) {
      const Tensor& b = state.parameters[j].value();
      if (!b.defined() || b.numel() == 0) continue;
      const auto end = [](const Tensor& t) {
        int64_t last = 1;
        for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
        return static_cast<const char*>(t.const_data_ptr()) + static_cast<size_t>(last) * t.element_size();
      };
      const bool apart = end(a) <= static_cast<const char*>(b.const_data_ptr()) ||
                         end(b) <= static_cast<const char*>(a.const_data_ptr());
      TORCH_CHECK_VALUE(apart, "step: no two parameters may share memory, got parameters ", j, " and ", i,
                        " that do (counted through the weights and then the biases)");
    }
  }
}

void check_length(PyObject* list, const char* name, size_t expected) {
  const size_t length = python::length_of(list);
  TORCH_CHECK_VALUE(length == expected, "step: ", name, " must have ", expected, " entries, got ", length);
}

void read_optimizer(State& state, const char* optimizer, PyObject* groups) {
  python::for_each(groups, [&](const Object& group) {
    TORCH_CHECK_TYPE(PyDict_Check(group.get()), "step: groups must hold dicts, got ", Py_TYPE(group.get())->tp_name);
    state.groups.push_back(group);
  });
  state.settings.resize(state.groups.size());
  state.optimizer = optimizer_of(optimizer);
  for (const Setting& setting : optimizer_list()[static_cast<size_t>(state.optimizer)].settings) {
    state.keys.push_back(Object::taken(PyUnicode_InternFromString(setting.name)));
  }
}

void read_parameters(State& state, PyObject* weights, PyObject* biases, PyObject* group_of, PyObject* states,
                     PyObject* counts) {
  const size_t depth = state.depth();
  state.parameters.resize(2 * depth);
  for (size_t i = 0; i < 2 * depth; ++i) {
    static const Tensor none;
    Learned& p = state.parameters[i];
    p.tensor = &none;
    const Object value = i < depth ? python::item(weights, i) : python::item(biases, i - depth);
    if (i < depth || !value.is_none()) {
      p.tensor = &tensor(value.get(), i < depth ? "weights" : "biases");
      p.object = value;
    }
    const int64_t group = python::integer_of(python::item(group_of, i).get());
    TORCH_CHECK_VALUE(group >= -1 && group < static_cast<int64_t>(state.groups.size()), "step: group_of must hold ",
                      "numbers of groups, or -1, got ", group);
    p.group = static_cast<int>(group);
    p.trained = p.trains();
    const Object count = python::item(counts, i);
    if (python::is_plain_tensor(count.get()) && is_counter(python::tensor_of(count.get()))) {
      p.counter = python::tensor_of(count.get());
    } else {
      p.count = python::integer_of(count.get());
    }
    const Object list = python::item(states, i);
    if (list.is_none()) continue;
    const size_t size = python::length_of(list.get());
    TORCH_CHECK_VALUE(size <= MAX_STATES, "step: state[", i, "] must have at most ", MAX_STATES, " entries");
    for (size_t s = 0; s < size; ++s) {
      const Object entry = python::item(list.get(), s);
      if (!entry.is_none()) p.state[s] = tensor(entry.get(), "state");
    }
  }
  state.dtype = state.parameters[0].value().scalar_type();
  TORCH_CHECK_TYPE(state.dtype == at::kBFloat16 || state.dtype == at::kFloat || state.dtype == at::kDouble,
                   "step: weights must be float32, float64 or bfloat16, got ", text(state.dtype));
}

void read_masters(State& state, PyObject* masters) {
  if (masters && masters != Py_None) check_length(masters, "masters", state.parameters.size());
  if (state.dtype != at::kBFloat16) return;
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    Learned& p = state.parameters[i];
    if (!p.value().defined() || p.group < 0) continue;
    TORCH_CHECK_TYPE(masters && masters != Py_None, "step: masters must be given for bfloat16 parameters");
    p.master = tensor(python::item(masters, i).get(), "masters");
    check(p.master, c10::str("masters[", i, "]"), at::kFloat, p.value().sizes());
    TORCH_CHECK_VALUE(p.master.is_contiguous(), "step: masters[", i, "] must be contiguous");
  }
}

void read_dropout(State& state, PyObject* dropout) {
  python::for_each(dropout, [&](const Object& p) {
    state.dropout.push_back(python::number_of(p.get()));
    TORCH_CHECK_VALUE(state.dropout.back() >= 0 && state.dropout.back() <= 1, "step: dropout must hold probabilities, ",
                      "got ", state.dropout.back());
    state.drops = state.drops || state.dropout.back() > 0;
  });
  TORCH_CHECK_VALUE(state.dropout.back() == 0, "step: dropout after the last layer must be 0, got ",
                    state.dropout.back());
}

void read_loss(State& state, const char* loss, PyObject* loss_parameters, const char* reduction, const char* on_nan,
               PyObject* class_weight, double label_smoothing) {
  state.loss = LossChoice(loss, python::numbers_of(loss_parameters));
  const std::string kind = reduction, nan = on_nan;
  TORCH_CHECK_VALUE(kind == "mean" || kind == "sum", "step: reduction must be mean or sum, got '", kind, "'");
  state.reduction = kind == "mean" ? Reduction::Mean : Reduction::Sum;
  TORCH_CHECK_VALUE(nan == "raise" || nan == "ignore", "step: on_nan must be raise or ignore, got '", nan, "'");
  state.on_nan = nan == "raise" ? OnNan::Stop : OnNan::Ignore;
  state.class_weight = optional_tensor(class_weight, "class_weight");
  const bool row = state.loss.over() == LossOver::Row;
  if (state.class_weight.defined()) {
    if (state.dtype == at::kBFloat16) state.class_weight = state.class_weight.to(at::kFloat);
    check(state.class_weight, "class_weight", wide(state.dtype), {state.outputs()});
  }
  TORCH_CHECK_VALUE(row || (!state.class_weight.defined() && label_smoothing == 0), "step: class_weight and ",
                    "label_smoothing are for cross_entropy alone, got loss '", loss, "'");
  TORCH_CHECK_VALUE(label_smoothing >= 0 && label_smoothing <= 1, "step: label_smoothing must be between 0 and 1, got ",
                    label_smoothing);
  state.label_smoothing = label_smoothing;
}

void read_watched(State& state, PyObject* watched) {
  python::for_each(watched, [&](const Object& entry) {
    const auto at = [&](size_t i) { return python::item(entry.get(), i); };
    const Object dictionary = at(0);
    TORCH_CHECK_TYPE(PyDict_Check(dictionary.get()), "step: watched must begin with dicts, got ",
                     Py_TYPE(dictionary.get())->tp_name);
    state.watched.push_back({dictionary, at(1), at(2)});
  });
}

void read_sizes(State& state, PyObject* sizes) {
  python::for_each(sizes, [&](const Object& entry) {
    const Object container = python::item(entry.get(), 0);
    TORCH_CHECK_TYPE(PyDict_Check(container.get()) || PyList_Check(container.get()),
                     "step: sizes must begin with dicts or lists, got ", Py_TYPE(container.get())->tp_name);
    Sized sized{container, python::integer_of(python::item(entry.get(), 1).get()), {}};
    all_entries(container.get(), [&](PyObject* object) {
      sized.entries.push_back(Object::shared(object));
      return true;
    });
    state.sizes.push_back(std::move(sized));
  });
}

}  // namespace

std::unique_ptr<State> new_state(PyObject* args, PyObject* keywords) {
  static const char* names[] = {"weights",         "biases",    "chain",        "dropout",         "loss",
                                "loss_parameters", "optimizer", "groups",       "group_of",        "state",
                                "counts",          "reduction", "class_weight", "label_smoothing", "ignore_index",
                                "max_norm",        "on_nan",    "generator",    "masters",         "watched",
                                "sizes",           nullptr};
  PyObject *weights, *biases, *chain, *dropout, *loss_parameters, *groups, *group_of, *states, *counts;
  PyObject *class_weight = nullptr, *generator = nullptr, *masters = nullptr, *watched = nullptr, *sizes = nullptr;
  const char *loss, *optimizer, *reduction = "mean", *on_nan = "raise";
  double label_smoothing = 0, max_norm = std::numeric_limits<double>::infinity();
  long long ignore_index = -100;
  if (!PyArg_ParseTupleAndKeywords(args, keywords, "OOOOsOsOOOO|$sOdLdsOOOO", const_cast<char**>(names), &weights,
                                   &biases, &chain, &dropout, &loss, &loss_parameters, &optimizer, &groups, &group_of,
                                   &states, &counts, &reduction, &class_weight, &label_smoothing, &ignore_index,
                                   &max_norm, &on_nan, &generator, &masters, &watched, &sizes)) {
    return nullptr;
  }
  auto state = std::make_unique<State>();
  state->chain = python::chain_of(chain);
  const size_t depth = state->depth();
  TORCH_CHECK_VALUE(depth >= 1, "step: the chain must have at least one layer");
  check_length(weights, "weights", depth);
  check_length(biases, "biases", depth);
  check_length(dropout, "dropout", depth);
  check_length(group_of, "group_of", 2 * depth);
  check_length(states, "state", 2 * depth);
  check_length(counts, "counts", 2 * depth);
  read_optimizer(*state, optimizer, groups);
  read_parameters(*state, weights, biases, group_of, states, counts);
  read_masters(*state, masters);
  check_layers(*state);
  read_dropout(*state, dropout);
  read_loss(*state, loss, loss_parameters, reduction, on_nan, class_weight, label_smoothing);
  TORCH_CHECK_VALUE(max_norm > 0, "step: max_norm must be positive, got ", max_norm);
  state->ignore_index = ignore_index;
  state->max_norm = max_norm;
  if (generator && generator != Py_None) {
    TORCH_CHECK_TYPE(THPGenerator_Check(generator), "step: generator must be a torch.Generator, got ",
                     Py_TYPE(generator)->tp_name);
    state->generator = THPGenerator_Unwrap(generator);
  }
  const bool narrow = state->dtype == at::kBFloat16;
  TORCH_CHECK_VALUE(narrow || !masters || masters == Py_None, "step: masters are for 16-bit parameters");
  TORCH_CHECK_TYPE(!narrow || !state->drops, "step: dropout must be 0 for bfloat16 parameters");
  if (watched) read_watched(*state, watched);
  if (sizes) read_sizes(*state, sizes);
  return state;
}

}  // namespace pyperc::train_step
