// A training step on the CPU: buffers, and the order of its passes.
#include "step.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "mlp.h"
#include "pass.h"

namespace pyperc {

namespace {

Coefficients coefficients_of(Optimizer optimizer, const double* settings, int64_t count, double clip) {
  switch (optimizer) {
#define X(O) \
  case Optimizer::O: return O::coefficients(settings, count, clip);
    PYPERC_OPTIMIZERS(X)
#undef X
  }
  return {};
}

// Layers with no dropout between them: one forward and one backward pass.
struct Segment {
  int first, count;
};

template <class T>
class StepRun {
 public:
  StepRun(const Kernels<T>& kernels, const Step<T>& step, const Parallel& parallel, void* workspace)
      : kernels_(kernels),
        step_(step),
        batch_(step.batch),
        parallel_(parallel),
        arena_(workspace),
        forward_(step.depth),
        backward_(step.depth) {
    const int64_t rows = batch_.size, inputs = step.layers[0].spec.in, outputs = step.layers[step.depth - 1].spec.out;
    threads_ =
        static_cast<int>(std::clamp<int64_t>(rows * (inputs + outputs) / ELEMENTS_PER_THREAD, 1, parallel.threads));
    x_ = {static_cast<const T*>(batch_.x), batch_.x_strides.rs, batch_.x_strides.cs};
    if (gathers_x()) {
      gathered_ = arena_.template take<T>(rows * padded(inputs, sizeof(T)));
      x_ = {gathered_, padded(inputs, sizeof(T)), 1};
    }
    y_ = {batch_.y, batch_.ld_y, 1};
    if (batch_.order && batch_.y) {
      gathered_y_ = arena_.template take<T>(rows * outputs);
      y_ = {gathered_y_, outputs, 1};
    }
    if (batch_.order && batch_.target) target_ = arena_.template take<int64_t>(rows);
    if (batch_.order && batch_.weight) weight_ = arena_.template take<T>(rows);
    lay_out();
  }
  size_t used() const { return arena_.used(); }

  StepResult operator()(Memory& memory) {
    StepResult result{Outcome::Done, 0, std::numeric_limits<double>::quiet_NaN(), kept_, 0};
    if (!take_targets(result)) return result;
    if (gathered_) {
      run(parallel_, threads_, [&](int64_t t) { gather_x(part(batch_.size, 1, t, threads_)); });
    }
    for (const Segment& segment : segments_) {
      forward(kernels_, plan(Pass::Forward, segment), forward_of(segment), parallel_, memory);
      const int last = segment.first + segment.count - 1;
      if (step_.layers[last].dropout > 0) drop(last, nullptr, 0);
    }
    result.loss = losses();
    if (step_.on_nan == OnNan::Stop && !std::isfinite(result.loss)) {
      result.outcome = Outcome::NanLoss;
      return result;
    }
    for (size_t k = segments_.size(); k-- > 0;) {
      const Segment& segment = segments_[k];
      if (segment.first + segment.count <= lowest_) break;
      const Backward<T> pass = backward_of(segment);
      backward(kernels_, plan(Pass::Backward, segment), pass, parallel_, memory);
      if (pass.wants_dx) drop(segment.first - 1, pass.dx.data, pass.dx.rs);
    }
    double clip = 1;
    if (std::isfinite(step_.max_norm)) {
      result.norm = norm();
      clip = std::min(1.0, step_.max_norm / (result.norm + 1e-6));
      if (std::isnan(result.norm)) clip = result.norm;
    }
    update(clip);
    return result;
  }

 private:
  // A parallel region costs a few microseconds, the time of about this many elements on one thread.
  static constexpr int64_t ELEMENTS_PER_THREAD = int64_t{1} << 15;

  bool gathers_x() const {
    return batch_.order || batch_.scale || batch_.stored != (sizeof(T) == 4 ? Stored::Float32 : Stored::Float64);
  }

  Plan plan(Pass pass, const Segment& segment) const {
    int64_t sizes[64];
    std::vector<int64_t> many;
    int64_t* list = sizes;
    if (segment.count >= 64) {
      many.resize(static_cast<size_t>(segment.count) + 1);
      list = many.data();
    }
    list[0] = step_.layers[segment.first].spec.in;
    for (int l = 0; l < segment.count; ++l) list[l + 1] = step_.layers[segment.first + l].spec.out;
    return make_plan(pass, kernels_.tile, sizeof(T), batch_.size, list, segment.count, parallel_.threads);
  }

  // Who keeps what, where.
  void lay_out() {
    const int depth = step_.depth;
    const int64_t rows = batch_.size;
    lowest_ = depth;
    for (int l = depth - 1; l >= 0; --l) {
      if (step_.layers[l].w.wanted() || step_.layers[l].b.wanted()) lowest_ = l;
    }
    const auto buffer = [&](int64_t columns) -> Matrix<T> {
      const int64_t ld = padded(columns, sizeof(T));
      kept_ += rows * columns * static_cast<int64_t>(sizeof(T));
      return {arena_.template take<T>(rows * ld), ld, 1};
    };
    for (int l = 0, first = 0; l < depth; ++l) {
      const StepLayer<T>& layer = step_.layers[l];
      const Saved saved = saved_of(layer.spec.activation);
      const bool ends = l + 1 == depth || layer.dropout > 0;
      ForwardLayer<T>& f = forward_[l];
      f.spec = layer.spec;
      f.w = {layer.w.data, layer.w.ld, 1};
      f.b = layer.b.data;
      // What is below the lowest trained layer is not read again.
      if (saved == Saved::Summation && l + 1 >= lowest_) f.s = buffer(layer.spec.out);
      if (ends || (saved != Saved::Summation && l + 1 >= lowest_)) f.x = buffer(layer.spec.out);
      BackwardLayer<T>& b = backward_[l];
      b.spec = layer.spec;
      b.w = f.w;
      if (l > first) b.x = {forward_[l - 1].x.data, forward_[l - 1].x.rs, 1};
      if (l == first) b.x = l ? Matrix<const T>{forward_[l - 1].x.data, forward_[l - 1].x.rs, 1} : x_;
      if (saved == Saved::Output) b.saved = {f.x.data, f.x.rs, 1};
      if (saved == Saved::Summation) b.saved = {f.s.data, f.s.rs, 1};
      if (!ends) b.ds = f.s.data ? f.s : f.x;
      b.wants_dw = layer.w.wanted();
      if (b.wants_dw) {
        b.dw = layer.w.gradient ? layer.w.gradient : arena_.template take<T>(layer.spec.out * layer.spec.in);
      }
      if (layer.b.wanted()) b.db = layer.b.gradient ? layer.b.gradient : arena_.template take<T>(layer.spec.out);
      if (ends) {
        segments_.push_back({first, l + 1 - first});
        first = l + 1;
      }
    }
    // ds may take the place of x(L) where f' does not read that.
    ForwardLayer<T>& last = forward_[depth - 1];
    dy_ = saved_of(last.spec.activation) == Saved::Output
              ? Matrix<T>{arena_.template take<T>(rows * padded(last.spec.out, sizeof(T))),
                          padded(last.spec.out, sizeof(T)), 1}
              : last.x;
    int64_t widest = 0;
    for (const Segment& segment : segments_) {
      if (has_dx(segment)) widest = std::max(widest, padded(step_.layers[segment.first].spec.in, sizeof(T)));
    }
    if (widest) {
      ld_dx_ = widest;
      for (T*& dx : dx_) dx = arena_.template take<T>(rows * widest);
    }
  }
  bool has_dx(const Segment& segment) const { return segment.first > lowest_; }

  static Saved saved_of(Activation activation) {
    switch (activation) {
#define X(A) \
  case Activation::A: return A::saved;
      PYPERC_ACTIVATIONS(X)
#undef X
    }
    return Saved::Nothing;
  }

  Forward<T> forward_of(const Segment& segment) const {
    return {batch_.size, backward_[segment.first].x, forward_.data() + segment.first, segment.count};
  }
  Backward<T> backward_of(const Segment& segment) const {
    const int end = segment.first + segment.count;
    Backward<T> pass{batch_.size, {}, has_dx(segment), {}, backward_.data() + segment.first, segment.count};
    // A segment's dx is the dy of the one below.
    pass.dy = end == step_.depth ? Matrix<const T>{dy_.data, dy_.rs, 1} : Matrix<const T>{dx_[end % 2], ld_dx_, 1};
    if (pass.wants_dx) pass.dx = {dx_[segment.first % 2], ld_dx_, 1};
    return pass;
  }

  // Targets and weights of the batch in its own order, and what the mean divides by. False for a wrong target.
  bool take_targets(StepResult& result) {
    const int64_t rows = batch_.size, outputs = step_.layers[step_.depth - 1].spec.out;
    const Objective<T>& objective = step_.objective;
    const int64_t* order = batch_.order;
    if (order) {
      for (int64_t i = 0; i < rows; ++i) {
        if (order[i] < 0 || order[i] >= batch_.rows) {
          result.outcome = Outcome::WrongTarget;
          result.row = i;
          return false;
        }
      }
    }
    const T* weight = batch_.weight;
    if (weight_) {
      for (int64_t i = 0; i < rows; ++i) weight_[i] = weight[order[i]];
      weight = weight_;
    }
    weights_ = weight;
    if (gathered_y_) {
      kernels_.gather({rows, outputs, batch_.y, sizeof(T) == 4 ? Stored::Float32 : Stored::Float64, batch_.ld_y, order,
                       nullptr, nullptr, gathered_y_, outputs});
    }
    double total = 0;
    if (batch_.target) {
      const int64_t* target = batch_.target;
      if (target_) {
        for (int64_t i = 0; i < rows; ++i) target_[i] = target[order[i]];
        target = target_;
      }
      targets_ = target;
      for (int64_t i = 0; i < rows; ++i) {
        if (target[i] == objective.ignore_index) continue;
        if (target[i] < 0 || target[i] >= outputs) {
          result.outcome = Outcome::WrongTarget;
          result.row = i;
          return false;
        }
        total += static_cast<double>((weight ? weight[i] : T(1)) *
                                     (objective.class_weight ? objective.class_weight[target[i]] : T(1)));
      }
    } else {
      total = static_cast<double>(rows);
      if (weight) {
        total = 0;
        for (int64_t i = 0; i < rows; ++i) total += static_cast<double>(weight[i]);
      }
      if (objective.over == LossOver::Element) total *= static_cast<double>(outputs);
    }
    scale_ = objective.reduction == Reduction::Mean ? 1 / total : 1;
    return true;
  }

  void gather_x(Range rows) const {
    if (rows.size() == 0) return;
    const int64_t inputs = step_.layers[0].spec.in;
    const size_t element = batch_.stored == Stored::UInt8 ? 1 : batch_.stored == Stored::Float32 ? 4 : 8;
    const int64_t ld = batch_.x_strides.rs;
    const char* from = static_cast<const char*>(batch_.x);
    if (!batch_.order) from += static_cast<size_t>(rows.begin * ld) * element;
    kernels_.gather({rows.size(), inputs, from, batch_.stored, ld, batch_.order ? batch_.order + rows.begin : nullptr,
                     batch_.scale, batch_.shift, gathered_ + rows.begin * x_.rs, x_.rs});
  }

  // Dropout after layer l; with dx also back through it.
  void drop(int l, T* dx, int64_t ld_dx) const {
    const StepLayer<T>& layer = step_.layers[l];
    const Matrix<T>& x = forward_[l].x;
    const double p = layer.dropout;
    run(parallel_, threads_, [&](int64_t t) {
      const Range rows = part(batch_.size, 1, t, threads_);
      kernels_.dropout({rows.begin, rows.size(), layer.spec.out, x.data + rows.begin * x.rs, x.rs,
                        dx ? dx + rows.begin * ld_dx : nullptr, ld_dx, step_.seed, static_cast<uint64_t>(l),
                        static_cast<uint32_t>(std::min(p * 0x1p32, 0x1p32 - 1)),
                        p < 1 ? static_cast<T>(1 / (1 - p)) : T(0)});
    });
  }

  // The loss; its derivative goes to dy.
  double losses() const {
    const Objective<T>& objective = step_.objective;
    const Matrix<T>& s = forward_[step_.depth - 1].x;
    double sums[MOST_THREADS] = {};
    const int threads = std::min(threads_, MOST_THREADS);
    run(parallel_, threads, [&](int64_t t) {
      const Range rows = part(batch_.size, 1, t, threads);
      LossBlock<T> block{};
      block.rows = rows.size();
      block.columns = step_.layers[step_.depth - 1].spec.out;
      block.s = s.data + rows.begin * s.rs;
      block.ld_s = s.rs;
      if (y_.data) block.y = y_.data + rows.begin * y_.rs;
      block.ld_y = y_.rs;
      if (targets_) block.target = targets_ + rows.begin;
      const T* weight = weights_ ? weights_ + rows.begin : nullptr;
      (objective.over == LossOver::Row ? block.weight : block.row_weight) = weight;
      block.parameters = objective.parameters;
      block.ds = dy_.data + rows.begin * dy_.rs;
      block.ld_ds = dy_.rs;
      block.scale = static_cast<T>(scale_);
      block.class_weight = objective.class_weight;
      block.smoothing = objective.smoothing;
      block.ignore_index = objective.ignore_index;
      kernels_.losses[static_cast<int>(objective.loss)](block);
      sums[t] = block.sum;
    });
    double sum = 0;
    for (int t = 0; t < threads; ++t) sum += sums[t];
    return sum * scale_;
  }

  template <class F>
  void each_parameter(F f) const {
    for (int l = 0; l < step_.depth; ++l) {
      const StepLayer<T>& layer = step_.layers[l];
      if (layer.w.settings) f(layer.w, backward_[l].dw, layer.spec.out, layer.spec.in);
      if (layer.b.settings) f(layer.b, backward_[l].db, int64_t{1}, layer.spec.out);
    }
  }
  double norm() const {
    double sum = 0;
    each_parameter([&](const Trained<T>&, const T* gradient, int64_t rows, int64_t columns) {
      sum += kernels_.sum_of_squares({gradient, columns, 1}, rows, columns);
    });
    return std::sqrt(sum);
  }
  void update(double clip) const {
    const double* settings = nullptr;
    int64_t count = 0;
    Coefficients coefficients{};
    UpdateFunction<T> function = nullptr;
    each_parameter([&](const Trained<T>& w, const T* gradient, int64_t rows, int64_t columns) {
      if (w.settings != settings || w.count != count) {
        settings = w.settings;
        count = w.count;
        coefficients = coefficients_of(step_.optimizer, settings, count, clip);
        function = kernels_.update[static_cast<int>(step_.optimizer)](live_states(step_.optimizer, settings));
      }
      const int64_t threads = std::clamp<int64_t>(rows * columns / ELEMENTS_PER_THREAD, 1, parallel_.threads);
      run(parallel_, threads, [&](int64_t t) {
        const Range own = part(rows, 1, t, threads);
        Update<T> g{
            own.size(), columns,     gradient + own.begin * columns, columns, w.data + own.begin * w.ld, w.ld, {},
            w.ld_state, coefficients};
        for (int s = 0; s < MAX_STATES; ++s) g.state[s] = w.state[s] ? w.state[s] + own.begin * w.ld_state : nullptr;
        function(g);
      });
    });
  }

  static constexpr int MOST_THREADS = 256;

  const Kernels<T>& kernels_;
  const Step<T>& step_;
  const Batch<T>& batch_;
  const Parallel& parallel_;
  Arena arena_;
  std::vector<ForwardLayer<T>> forward_;
  std::vector<BackwardLayer<T>> backward_;
  std::vector<Segment> segments_;
  Matrix<const T> x_, y_;
  Matrix<T> dy_;
  T *gathered_ = nullptr, *gathered_y_ = nullptr, *weight_ = nullptr, *dx_[2] = {};
  int64_t* target_ = nullptr;
  const int64_t* targets_ = nullptr;
  const T* weights_ = nullptr;
  int64_t ld_dx_ = 0, kept_ = 0;
  double scale_ = 1;
  int threads_ = 1, lowest_ = 0;
};

}  // namespace

int live_states(Optimizer optimizer, const double* settings) {
  switch (optimizer) {
#define X(O) \
  case Optimizer::O: return O::live(settings);
    PYPERC_OPTIMIZERS(X)
#undef X
  }
  return 0;
}

template <class T>
size_t step_workspace(const Kernels<T>& kernels, const Step<T>& step, const Parallel& parallel) {
  // Any address will do: only which pointers are null matters to the count.
  return StepRun<T>(kernels, step, parallel, reinterpret_cast<void*>(std::uintptr_t{64})).used();
}

template <class T>
StepResult step(const Kernels<T>& kernels, const Step<T>& step, const Parallel& parallel, void* workspace,
                Memory& memory) {
  return StepRun<T>(kernels, step, parallel, workspace)(memory);
}

#define PYPERC_INSTANTIATE(T)                                                            \
  template size_t step_workspace<T>(const Kernels<T>&, const Step<T>&, const Parallel&); \
  template StepResult step<T>(const Kernels<T>&, const Step<T>&, const Parallel&, void*, Memory&);
PYPERC_INSTANTIATE(float)
PYPERC_INSTANTIATE(double)

}  // namespace pyperc
