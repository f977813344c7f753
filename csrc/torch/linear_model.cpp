// The losses and the passes of the linear models: checks, allocation, calls. The estimators are in pyperc/linear_model.
#include "linear_model.h"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../cpu/dispatch.h"
#include "../cpu/linear_model.h"
#include "losses.h"
#include "threads.h"

namespace py = pybind11;

namespace pyperc {

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

template <class F>
auto with_dtype(const Tensor& t, F f) {
  return t.scalar_type() == at::kFloat ? f(0.0f) : f(0.0);
}

// What the kernels read: a dense CPU tensor of that dtype and that shape, contiguous.
void check(const Tensor& t, const char* name, at::ScalarType dtype, c10::IntArrayRef sizes) {
  TORCH_CHECK_TYPE(t.defined() && t.device().is_cpu() && t.layout() == at::kStrided && t.scalar_type() == dtype, name,
                   " must be a dense ", dtype, " tensor on the CPU, got ", t.toString());
  TORCH_CHECK_VALUE(t.sizes() == sizes, name, " must be of shape ", sizes, ", got ", t.sizes());
  TORCH_CHECK_VALUE(t.is_contiguous(), name, " must be contiguous");
}
void check(const Optional& t, const char* name, at::ScalarType dtype, c10::IntArrayRef sizes) {
  if (t) check(*t, name, dtype, sizes);
}
void check_x(const Tensor& x) {
  TORCH_CHECK_TYPE(x.device().is_cpu() && x.layout() == at::kStrided &&
                       (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                   "x must be a dense float32 or float64 tensor on the CPU, got ", x.toString());
  TORCH_CHECK_VALUE(x.dim() == 2 && x.size(1) >= 1, "x must be [rows, columns], got ", x.sizes());
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) == 1, "x must have rows of adjacent elements, got strides ",
                    x.strides());
}
void check_classes(const Tensor& target, int64_t classes) {
  const int64_t* t = target.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < target.numel(); ++i) {
    TORCH_CHECK_VALUE(t[i] >= 0 && t[i] < classes, "target must hold classes from 0 to ", classes - 1, ", got ", t[i]);
  }
}
template <class T>
const T* data(const Optional& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

// (loss of each element or row, or their sum; scale * its gradient, or None).
std::pair<Tensor, Optional> loss_and_gradient(const Tensor& input, const Tensor& target, const Optional& weight,
                                              const std::string& name, const std::vector<double>& parameters, bool sum,
                                              double scale, bool gradient) {
  const LossChoice choice(name, parameters);
  const bool row = choice.over() == LossOver::Row;
  TORCH_CHECK_TYPE(input.device().is_cpu() && (input.scalar_type() == at::kFloat || input.scalar_type() == at::kDouble),
                   "loss: input must be a float32 or float64 tensor on the CPU, got ", input.toString());
  check(input, "loss: input", input.scalar_type(), input.sizes());
  TORCH_CHECK_VALUE(!row || (input.dim() == 2 && input.size(1) > 0), "loss: input must be [rows, classes], got ",
                    input.sizes());
  const c10::IntArrayRef samples = row ? input.sizes().slice(0, 1) : input.sizes();
  check(target, "loss: target", row ? at::kLong : input.scalar_type(), samples);
  check(weight, "loss: weight", input.scalar_type(), samples);
  if (row) check_classes(target, input.size(1));
  const Tensor value = sum ? Tensor() : at::detail::empty_cpu(samples, input.scalar_type());
  const Optional ds = gradient ? Optional(at::detail::empty_cpu(input.sizes(), input.scalar_type())) : std::nullopt;
  double total = 0;
  with_dtype(input, [&](auto zero) {
    using T = decltype(zero);
    LossBlock<T> block{};
    block.rows = row ? input.size(0) : 1;
    block.columns = row ? input.size(1) : input.numel();
    block.s = input.const_data_ptr<T>();
    block.ld_s = block.ld_ds = block.columns;
    if (row) {
      block.target = target.const_data_ptr<int64_t>();
    } else {
      block.y = target.const_data_ptr<T>();
    }
    block.weight = data<T>(weight);
    block.parameters = choice.parameters;
    block.value = value.defined() ? value.data_ptr<T>() : nullptr;
    block.ld_value = 1;
    block.ds = ds ? ds->data_ptr<T>() : nullptr;
    block.scale = static_cast<T>(scale);
    const py::gil_scoped_release unlocked;
    loss(isa().kernels(T{}), choice.loss, block, torch_threads());
    total = block.sum;
  });
  if (!sum) return {value, ds};
  const Tensor result = at::detail::empty_cpu({}, input.scalar_type());
  with_dtype(input, [&](auto zero) { *result.data_ptr<decltype(zero)>() = static_cast<decltype(zero)>(total); });
  return {result, ds};
}

// (sum of weight * loss, dw [classes, columns], db [classes]) of the linear model s = x w^T + b.
std::tuple<double, Tensor, Tensor> linear_objective(const Tensor& x, const Tensor& w, const Optional& b,
                                                    const Tensor& target, const Optional& weight,
                                                    const Optional& positive, const std::string& name,
                                                    const std::vector<double>& parameters) {
  const LossChoice choice(name, parameters);
  check_x(x);
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_VALUE(w.dim() == 2, "w must be [classes, columns], got ", w.sizes());
  const int64_t rows = x.size(0), columns = x.size(1), classes = w.size(0);
  check(w, "w", dtype, {classes, columns});
  check(b, "b", dtype, {classes});
  check(weight, "weight", dtype, {rows});
  check(positive, "positive", dtype, {classes});
  const bool numbers = classes == 1 && choice.over() == LossOver::Element;
  check(target, "target", numbers ? dtype : at::kLong, {rows});
  if (!numbers) check_classes(target, classes);
  const Tensor dw = at::detail::empty_cpu({classes, columns}, dtype), db = at::detail::empty_cpu({classes}, dtype);
  double value = 0;
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    LinearRows<T> pass{};
    pass.rows = rows;
    pass.columns = columns;
    pass.classes = classes;
    pass.x = x.const_data_ptr<T>();
    pass.ld = x.stride(0);
    pass.w = w.const_data_ptr<T>();
    pass.b = data<T>(b);
    if (numbers) {
      pass.y = target.const_data_ptr<T>();
    } else {
      pass.target = target.const_data_ptr<int64_t>();
    }
    pass.weight = data<T>(weight);
    pass.positive = data<T>(positive);
    pass.loss = choice.loss;
    pass.parameters = choice.parameters;
    pass.dw = dw.data_ptr<T>();
    pass.db = db.data_ptr<T>();
    const Parallel parallel = torch_threads();
    const Tensor workspace = at::detail::empty_cpu({objective_workspace(pass, parallel.threads)}, dtype);
    const py::gil_scoped_release unlocked;
    objective(isa().kernels(T{}), pass, parallel, workspace.data_ptr<T>());
    value = pass.value;
  });
  return {value, dw, db};
}

using PairTable = std::tuple<Tensor, Tensor, Tensor>;  // first, begin, second: as in struct Products

Products products_of(const std::optional<PairTable>& table, int64_t columns) {
  if (!table) return {};
  const auto& [first, begin, second] = *table;
  const int64_t groups = first.numel(), count = second.numel();
  check(first, "products: first", at::kInt, {groups});
  check(begin, "products: begin", at::kInt, {groups + 1});
  check(second, "products: second", at::kInt, {count});
  const Products p{groups, count, first.const_data_ptr<int32_t>(), begin.const_data_ptr<int32_t>(),
                   second.const_data_ptr<int32_t>()};
  const auto inside = [&](int32_t column) { return column >= 0 && column < columns; };
  bool good = p.begin[0] == 0 && p.begin[groups] == count;
  for (int64_t g = 0; g < groups; ++g) good = good && inside(p.first[g]) && p.begin[g] <= p.begin[g + 1];
  for (int64_t k = 0; k < count; ++k) good = good && inside(p.second[k]);
  TORCH_CHECK_VALUE(good, "products: must be groups of pairs of columns below ", columns);
  return p;
}

// One epoch of the perceptron algorithm for each class; w, b, sum_w, sum_b and scores are written. Returns the changes
// of each class. `positive[c]` is the class of w[c] among the targets.
std::vector<int64_t> perceptron_epoch_from_python(const Tensor& x, const Tensor& target, const Tensor& w,
                                                  const Optional& b, const std::vector<int64_t>& positive, double eta,
                                                  const Optional& order, const Optional& weight, const Optional& own,
                                                  const std::optional<PairTable>& pairs, const Optional& scores,
                                                  const std::optional<std::pair<Tensor, Tensor>>& sums, int64_t step) {
  check_x(x);
  const at::ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1), classes = static_cast<int64_t>(positive.size());
  const Products products = products_of(pairs, columns);
  const int64_t features = columns + products.count;
  check(target, "target", at::kLong, {rows});
  check(w, "w", dtype, {classes, features});
  check(b, "b", dtype, {classes});
  check(weight, "weight", dtype, {rows});
  check(own, "own", dtype, {classes});
  check(scores, "scores", dtype, {rows, classes});
  if (sums) {
    check(sums->first, "sums[0]", dtype, {classes, features});
    check(sums->second, "sums[1]", dtype, {classes});
  }
  if (order) {
    check(order, "order", at::kLong, {order->numel()});
    check_classes(*order, rows);
  }
  const Tensor first = scores ? w.clone() : w, first_b = scores && b ? b->clone() : Tensor();
  std::vector<int64_t> changes;
  if (classes == 0) return changes;
  with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    std::vector<PerceptronRows<T>> list(static_cast<size_t>(classes));
    for (int64_t c = 0; c < classes; ++c) {
      PerceptronRows<T>& g = list[static_cast<size_t>(c)];
      g = {};
      g.begin = 0;
      g.end = order ? order->numel() : rows;
      g.columns = columns;
      g.x = x.const_data_ptr<T>();
      g.ld = x.stride(0);
      g.order = data<int64_t>(order);
      g.target = target.const_data_ptr<int64_t>();
      g.positive = positive[static_cast<size_t>(c)];
      g.weight = data<T>(weight);
      g.own = own ? own->const_data_ptr<T>()[c] : T(1);
      g.products = products;
      g.eta = static_cast<T>(eta);
      g.w = w.data_ptr<T>() + c * features;
      g.b = b ? b->data_ptr<T>() + c : nullptr;
      g.first = first.const_data_ptr<T>() + c * features;
      g.first_b = first_b.defined() ? first_b.const_data_ptr<T>()[c] : T(0);
      g.scores = scores ? scores->data_ptr<T>() + c : nullptr;
      g.ld_scores = classes;
      g.sum = sums ? sums->first.data_ptr<T>() + c * features : nullptr;
      g.sum_b = sums ? sums->second.data_ptr<T>() + c : nullptr;
      g.step = step;
    }
    const py::gil_scoped_release unlocked;
    perceptron_epoch(isa().kernels(T{}), list.data(), classes, torch_threads());
    for (const PerceptronRows<T>& g : list) changes.push_back(g.count);
  });
  return changes;
}

// Dual coordinate descent for one class: w [columns], b [1] and alpha [rows] are read and written. Returns the epochs
// taken and the violation of the last.
std::pair<int64_t, double> dual_descent(const Tensor& x, const Tensor& y, const Tensor& upper, double bias,
                                        const Tensor& w, const Tensor& b, const Tensor& alpha, int64_t max_epochs,
                                        double tolerance, uint64_t seed) {
  check_x(x);
  const at::ScalarType dtype = x.scalar_type();
  const int64_t rows = x.size(0), columns = x.size(1);
  TORCH_CHECK_VALUE(rows < (int64_t{1} << 31), "x must have fewer than 2^31 rows, got ", rows);
  check(y, "y", dtype, {rows});
  check(upper, "upper", dtype, {rows});
  check(w, "w", dtype, {columns});
  check(b, "b", at::kDouble, {1});
  check(alpha, "alpha", at::kDouble, {rows});
  const Tensor index = at::detail::empty_cpu({rows}, at::kInt), norm = at::detail::empty_cpu({rows}, dtype);
  return with_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    DualDescent<T> g{};
    g.rows = rows;
    g.columns = columns;
    g.x = x.const_data_ptr<T>();
    g.ld = x.stride(0);
    g.y = y.const_data_ptr<T>();
    g.upper = upper.const_data_ptr<T>();
    g.bias = bias;
    g.w = w.data_ptr<T>();
    g.b = *b.const_data_ptr<double>();
    g.alpha = alpha.data_ptr<double>();
    g.index = index.data_ptr<int32_t>();
    g.norm = norm.data_ptr<T>();
    g.max_epochs = max_epochs;
    g.tolerance = tolerance;
    g.seed = seed;
    const py::gil_scoped_release unlocked;
    isa().kernels(T{}).dual_descent(g);
    *b.data_ptr<double>() = g.b;
    return std::pair<int64_t, double>(g.epochs, g.violation);
  });
}

}  // namespace

void register_linear_model(py::module_& m) {
  py::class_<LossInfo>(m, "LossInfo")
      .def_readonly("name", &LossInfo::name)
      .def_readonly("parameters", &LossInfo::parameters)
      .def_readonly("defaults", &LossInfo::defaults)
      .def_property_readonly("over",
                             [](const LossInfo& info) { return info.over == LossOver::Row ? "row" : "element"; });
  m.def("losses", &loss_list);
  m.def("loss", &loss_and_gradient, py::arg("input"), py::arg("target"), py::arg("weight"), py::arg("name"),
        py::arg("parameters"), py::arg("sum"), py::arg("scale"), py::arg("gradient"));
  m.def("linear_objective", &linear_objective, py::arg("x"), py::arg("w"), py::arg("b"), py::arg("target"),
        py::arg("weight"), py::arg("positive"), py::arg("name"), py::arg("parameters"));
  m.def("perceptron_epoch", &perceptron_epoch_from_python, py::arg("x"), py::arg("target"), py::arg("w"), py::arg("b"),
        py::arg("positive"), py::arg("eta"), py::arg("order"), py::arg("weight"), py::arg("own"), py::arg("products"),
        py::arg("scores"), py::arg("sums"), py::arg("step"));
  m.def("dual_descent", &dual_descent, py::arg("x"), py::arg("y"), py::arg("upper"), py::arg("bias"), py::arg("w"),
        py::arg("b"), py::arg("alpha"), py::arg("max_epochs"), py::arg("tolerance"), py::arg("seed"));
}

}  // namespace pyperc
