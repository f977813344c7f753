// The Python module pyperc._C.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <algorithm>

#include "../cpu/dispatch.h"
#include "../cpu/plan.h"
#include "autograd.h"
#include "backend.h"
#include "linear_model.h"
#include "native.h"
#include "operators.h"
#include "optimizers.h"
#include "round_trip.h"
#include "run.h"
#include "step.h"

namespace py = pybind11;

namespace pyperc {

namespace {

const Tensor& tensor(py::handle object, const char* name) {
  TORCH_CHECK_TYPE(python::is_tensor(object.ptr()), "mlp: ", name, " must be a tensor, got ",
                   Py_TYPE(object.ptr())->tp_name);
  return python::tensor_of(object.ptr());
}

// None becomes an undefined tensor, which stands for a missing bias.
Tensors tensors(const py::sequence& list, const char* name) {
  Tensors result;
  result.reserve(list.size());
  for (const py::handle item : list) {
    if (item.is_none()) {
      result.emplace_back();
    } else {
      result.push_back(tensor(item, name));
    }
  }
  return result;
}

template <Tensor (*function)(const Tensor&, const Network&)>
Tensor from_python(py::handle x, const py::sequence& weights, const py::sequence& biases, const Chain& chain) {
  const Tensors w = tensors(weights, "weights"), b = tensors(biases, "biases");
  const Tensor& input = tensor(x, "x");
  const py::gil_scoped_release unlocked;
  return function(input, {w, b, chain});
}

// The decompositions of the operators, for tracers that are to see torch's own operations alone.
Tensors composed_forward(const Tensor& x, const py::sequence& weights, const py::sequence& biases, const Chain& chain) {
  const Tensors w = tensors(weights, "weights"), b = tensors(biases, "biases");
  const py::gil_scoped_release unlocked;
  return operators::composed_forward(x, {w, b, chain});
}
Tensors composed_backward(const Tensor& dy, const Tensor& x, const Tensors& weights, const Tensors& saved,
                          const Chain& chain, const std::vector<bool>& needs) {
  const py::gil_scoped_release unlocked;
  return operators::composed_backward(dy, x, weights, saved, chain, needs);
}

LayerActivation one(const std::string& name, const std::vector<double>& parameters) {
  return Chain({name}, {parameters})[0];
}

const char* name_of(Saved saved) {
  switch (saved) {
    case Saved::Nothing: return "nothing";
    case Saved::Output: return "output";
    case Saved::Summation: return "summation";
  }
  return "";
}

py::dict plan(py::handle x, const py::sequence& weights, const py::sequence& biases, const Chain& chain) {
  const Tensors w = tensors(weights, "weights"), b = tensors(biases, "biases");
  const Tensor& input = tensor(x, "x");
  const Network network{w, b, chain};
  check(input, network);
  const char* reason = reason_for_aten(input, chain);
  py::dict report;
  report["path"] = reason ? "aten" : "native";
  report["reason"] = reason ? reason : "";
  report["dtype"] = std::string(c10::getDtypeNames(input.scalar_type()).first);
  py::list layers;
  if (reason) {
    for (size_t l = 0; l < network.depth(); ++l) {
      py::dict layer;
      layer["in"] = w[l].size(1);
      layer["out"] = w[l].size(0);
      layer["activation"] = chain[l].info().name;
      layer["saved"] = name_of(chain[l].saved());
      layers.append(layer);
    }
  } else {
    const native::NetworkPlan native = native::plan(input, network);
    report["isa"] = native.isa;
    report["threads"] = native.threads;
    if (const native::BackwardPlan& b = native.backward; b.threads > 0) {
      py::dict backward;
      backward["threads"] = b.threads;
      backward["split"] = b.split;
      backward["chunk"] = b.chunk;
      report["backward"] = backward;
    }
    for (const native::LayerPlan& l : native.layers) {
      py::dict layer;
      layer["in"] = l.in;
      layer["out"] = l.out;
      layer["activation"] = l.activation;
      layer["saved"] = name_of(l.saved);
      layer["kernel"] = l.kernel;
      layer["tile"] = l.tile;
      layer["blocking"] = l.blocking;
      layer["pack"] = l.pack;
      layer["flops"] = l.flops;
      layers.append(layer);
    }
  }
  report["layers"] = layers;
  return report;
}

std::vector<std::string> names(const std::vector<const Isa*>& list) {
  std::vector<std::string> result;
  for (const Isa* isa : list) result.emplace_back(isa->name);
  return result;
}

std::pair<int, int> tile(const std::string& name, py::object dtype) {
  TORCH_CHECK_TYPE(THPDtype_Check(dtype.ptr()), "tile: dtype must be a torch.dtype, got ",
                   Py_TYPE(dtype.ptr())->tp_name);
  for (const Isa* isa : isas_built()) {
    if (isa->name != name) continue;
    Tile tile{};
    const bool known = visit(reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type,
                             [&](auto zero) { tile = isa->kernels(zero).tile; });
    TORCH_CHECK_VALUE(known, "tile: dtype must be one that has kernels, got ", py::str(dtype).cast<std::string>());
    return {tile.mr, tile.nr()};
  }
  TORCH_CHECK_VALUE(false, "tile: isa must be one of ", c10::Join(", ", names(isas_built())), ", got '", name, "'");
}

std::vector<Threshold> thresholds_of(const std::string& device) {
  const Backend* backend = find_backend(c10::Device(device).type());
  TORCH_CHECK_VALUE(backend, "thresholds: device must be one with kernels, got '", device, "'");
  return backend->thresholds();
}

py::dict table_of_thresholds(const std::string& device) {
  py::dict table;
  for (const auto& [name, value] : thresholds_of(device)) table[name] = *value;
  return table;
}

void set_thresholds(const py::dict& values, const std::string& device) {
  const std::vector<Threshold> table = thresholds_of(device);
  std::vector<std::pair<int64_t*, int64_t>> changes;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
    const auto found = std::find_if(table.begin(), table.end(), [&](const Threshold& t) { return name == t.name; });
    TORCH_CHECK_VALUE(found != table.end(), "set_thresholds: '", name,
                      "' must be one of those that thresholds() lists");
    changes.emplace_back(found->value, value.cast<int64_t>());
  }
  for (const auto& [place, value] : changes) *place = value;
}

py::dict build() {
  py::dict facts;
  facts["torch"] = TORCH_VERSION;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "gcc " __VERSION__;
#endif
#if defined(_OPENMP)
  facts["openmp"] = true;
#else
  facts["openmp"] = false;
#endif
  if (find_backend(c10::DeviceType::CUDA)) {
    facts["cuda"] = "sm_80, sm_90a";
    facts["cuda_reason"] = "";
  } else {
    facts["cuda"] = py::none();
    facts["cuda_reason"] = "nvcc was not found, or torch is a build for the CPU and FORCE_CUDA=1 was not set";
  }
  return facts;
}

// c10's errors carry the Python exception that they stand for.
void translate(std::exception_ptr pointer) {
  try {
    if (pointer) std::rethrow_exception(pointer);
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    PyErr_SetString(PyExc_IndexError, e.what_without_backtrace());
  } catch (const c10::NotImplementedError& e) {
    PyErr_SetString(PyExc_NotImplementedError, e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  py::register_local_exception_translator(translate);

  py::class_<ActivationInfo>(m, "ActivationInfo")
      .def_readonly("name", &ActivationInfo::name)
      .def_readonly("parameters", &ActivationInfo::parameters)
      .def_readonly("defaults", &ActivationInfo::defaults)
      .def_property_readonly("saved", [](const ActivationInfo& info) { return name_of(info.saved); });
  m.def("activations", &activation_list);

  using Layers = std::vector<std::pair<std::string, std::vector<double>>>;
  const auto make_chain = [](const Layers& layers) {
    std::vector<std::string> names;
    std::vector<std::vector<double>> parameters;
    for (const auto& [name, list] : layers) {
      names.push_back(name);
      parameters.push_back(list);
    }
    return Chain(names, parameters);
  };
  const auto as_layers = [](const Chain& chain) {
    Layers layers;
    for (size_t l = 0; l < chain.size(); ++l) layers.emplace_back(chain.names()[l], chain.parameters()[l]);
    return layers;
  };
  py::class_<Chain>(m, "Chain")
      .def(py::init(make_chain), py::arg("layers"))
      .def("__len__", &Chain::size)
      .def(
          "__eq__", [=](const Chain& a, const Chain& b) { return as_layers(a) == as_layers(b); }, py::is_operator())
      .def("__hash__", [=](const Chain& chain) { return py::hash(py::str(py::cast(as_layers(chain)))); })
      .def(
          "__repr__",
          [=](const Chain& chain) { return "Chain(" + py::repr(py::cast(as_layers(chain))).cast<std::string>() + ")"; })
      .def_property_readonly("names", &Chain::names)
      .def_property_readonly("parameters", &Chain::parameters)
      .def(py::pickle([=](const Chain& chain) { return py::make_tuple(as_layers(chain)); },
                      [=](const py::tuple& state) { return make_chain(state[0].cast<Layers>()); }));

  m.def("mlp", &from_python<mlp>, py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("chain"));
  m.def("mlp_of_subclass", &from_python<mlp_of_subclass>, py::arg("x"), py::arg("weights"), py::arg("biases"),
        py::arg("chain"));
  m.def("composed_forward", &composed_forward, py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("chain"));
  m.def("composed_backward", &composed_backward, py::arg("dy"), py::arg("x"), py::arg("weights"), py::arg("saved"),
        py::arg("chain"), py::arg("needs"));
  m.def(
      "composed_activation",
      [](const Tensor& x, const std::string& name, const std::vector<double>& parameters) {
        return composition::activation(x, one(name, parameters));
      },
      py::arg("x"), py::arg("name"), py::arg("parameters"));
  m.def(
      "activation",
      [](const Tensor& x, const std::string& name, const std::vector<double>& parameters) {
        return native::activation(x, one(name, parameters));
      },
      py::arg("x"), py::arg("name"), py::arg("parameters") = std::vector<double>());
  m.def("plan", &plan, py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("chain"));

  py::class_<OptimizerInfo>(m, "OptimizerInfo")
      .def_readonly("name", &OptimizerInfo::name)
      .def_readonly("states", &OptimizerInfo::states)
      .def_property_readonly("settings", [](const OptimizerInfo& info) {
        py::list list;
        for (const Setting& setting : info.settings) list.append(py::make_tuple(setting.name, setting.value));
        return list;
      });
  m.def("optimizers", &optimizer_list);

  if (!add_run_type(m.ptr()) || !add_step_type(m.ptr())) throw py::error_already_set();

  m.def("isas_built", [] { return names(isas_built()); });
  m.def("isas", [] { return names(isas_here()); });
  m.def("isa", [] { return std::string(isa().name); });
  m.def("use_isa", &use_isa, py::arg("name"));
  m.def("tile", &tile, py::arg("isa"), py::arg("dtype"));
  m.def("probe", &native::probe, py::arg("seconds") = 0.01, py::call_guard<py::gil_scoped_release>());
  m.def("round_trip", &round_trip, py::call_guard<py::gil_scoped_release>());
  m.def("thresholds", &table_of_thresholds, py::arg("device") = "cpu");
  m.def("set_thresholds", &set_thresholds, py::arg("values"), py::arg("device") = "cpu");
  m.def("reset_thresholds", &reset_thresholds);
  m.def("build", &build);

  register_linear_model(m);
}

}  // namespace pyperc
