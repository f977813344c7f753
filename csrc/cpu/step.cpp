// A training step on the CPU: buffers, and the order of its passes.
#include "step.h"

#include <cmath>
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

template <class S>
class StepRun {
  using T = Wide<S>;
  static constexpr bool NARROW = !std::is_same_v<S, T>;
  static constexpr Stored STORED = NARROW ? Stored::BFloat16 : sizeof(S) == 4 ? Stored::Float32 : Stored::Float64;

 public:
  StepRun(const KernelsOf<S>& kernels, const Kernels<T>& wide, const Step<S>& step, const Parallel& parallel,
          Memory& memory)
      : kernels_(kernels),
        wide_(wide),
        step_(step),
        batch_(step.batch),
        parallel_(parallel),
        memory_(memory),
        forward_(step.depth),
        backward_(step.depth),
        descents_(step.depth),
        updates_w_(!NARROW && !std::isfinite(step.max_norm) && step.batch.size > 0) {
    lowest_ = step.depth;
    for (int l = step.depth - 1, end = step.depth; l >= 0; --l) {
      const StepLayer<S>& layer = step.layers[l];
      if (layer.w.wanted() || layer.b.wanted()) lowest_ = l;
      if (l == 0 || step.layers[l - 1].dropout > 0) {
        segments_.insert(segments_.begin(), {l, end - l});
        end = l;
      }
    }
    if (updates_w_) prepare_descents();
  }

  StepResult operator()() {
    const Workspace workspace(memory_, [&](Arena& arena) { lay_out(arena); });
    StepResult result{Outcome::Done, 0, std::numeric_limits<double>::quiet_NaN(), kept_, 0};
    if (!take_targets(result)) return result;
    if (gathered_.data) {
      by_rows(step_.layers[0].spec.in, [&](int64_t t, Range rows) { gather_x(t, rows); });
    }
    for (const Segment& segment : segments_) {
      forward(kernels_, plan(Pass::Forward, segment), forward_of(segment), parallel_, memory_);
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
      const Backward<S> pass = backward_of(segment);
      backward(kernels_, plan(Pass::Backward, segment), pass, parallel_, memory_);
      if (pass.wants_dx) drop(segment.first - 1, pass.dx.data, pass.dx.rs);
    }
    double clip = 1;
    if (std::isfinite(step_.max_norm)) {
      result.norm = norm();
      clip = std::isnan(result.norm) ? result.norm : std::min(1.0, step_.max_norm / (result.norm + 1e-6));
    }
    update(clip);
    return result;
  }

 private:
  // A parallel region costs a few microseconds, the time of about this many elements on one thread.
  static constexpr int MOST_THREADS = 256;
  static constexpr int64_t ELEMENTS_PER_THREAD = int64_t{1} << 14;
  int64_t threads_for(int64_t elements) const {
    return std::clamp<int64_t>(elements / ELEMENTS_PER_THREAD, 1, std::min(parallel_.threads, MOST_THREADS));
  }
  // f(t, rows) for each thread's rows of the batch, which have so many columns.
  template <class F>
  void by_rows(int64_t columns, F f) const {
    const int64_t threads = threads_for(batch_.size * columns);
    run(parallel_, threads, [&](int64_t t) { f(t, part(batch_.size, 1, t, threads)); });
  }

  bool gathers_x() const { return batch_.order || batch_.scale || batch_.stored != STORED; }

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
    Plan plan = make_plan(pass, kernels_.tile, sizeof(S), batch_.size, list, segment.count, parallel_.threads);
    // The workspace stays, and is to be little beside what is kept.
    plan.packed_bytes = std::min(plan.packed_bytes, std::max(kept_ / 8, thresholds().chunk_bytes));
    return plan;
  }

  // Who keeps what, where.
  void lay_out(Arena& arena) {
    const int depth = step_.depth;
    const int64_t rows = batch_.size, inputs = step_.layers[0].spec.in, outputs = step_.layers[depth - 1].spec.out;
    const auto rows_of = [&](int64_t columns) -> Matrix<S> {
      const int64_t ld = padded(columns, sizeof(S));
      return {arena.template take<S>(rows * ld), ld, 1};
    };
    const auto kept = [&](int64_t columns) {
      kept_ += rows * columns * static_cast<int64_t>(sizeof(S));
      return rows_of(columns);
    };
    kept_ = 0;
    x_ = {static_cast<const S*>(batch_.x), batch_.rs, batch_.cs};
    if (gathers_x()) {
      gathered_ = rows_of(inputs);
      x_ = {gathered_.data, gathered_.rs, 1};
    }
    if (batch_.y && (batch_.order || NARROW)) y_ = {arena.template take<T>(rows * outputs), outputs, 1};
    if (batch_.order && batch_.target) target_ = arena.template take<int64_t>(rows);
    if (batch_.weight && (batch_.order || NARROW)) weight_ = arena.template take<T>(rows);
    if (NARROW) {
      scores_ = {arena.template take<T>(rows * outputs), outputs, 1};
      int64_t widest = inputs;
      for (int l = 0; l < depth; ++l) widest = std::max(widest, step_.layers[l].spec.out);
      ld_row_ = padded(widest, sizeof(T));
      rows_wide_ = arena.template take<T>(parallel_.threads * ld_row_);
    }
    Matrix<const S> x = x_;
    for (int l = 0; l < depth; ++l) {
      const StepLayer<S>& layer = step_.layers[l];
      const Saved saved = saved_of(layer.spec.activation);
      const bool ends = l + 1 == depth || layer.dropout > 0;
      ForwardLayer<S>& f = forward_[l];
      f.spec = layer.spec;
      f.w = {layer.w.data, layer.w.ld, 1};
      f.b = layer.b.data;
      // What is below the lowest trained layer is not read again.
      const bool keeps = l + 1 >= lowest_;
      f.s = f.x = {};
      if (saved == Saved::Summation && keeps) f.s = kept(layer.spec.out);
      if (ends || (saved != Saved::Summation && keeps)) f.x = kept(layer.spec.out);
      BackwardLayer<S>& b = backward_[l];
      b.spec = layer.spec;
      b.w = f.w;
      b.x = x;
      x = {f.x.data, f.x.rs, 1};
      b.saved = {};
      if (saved == Saved::Output) b.saved = x;
      if (saved == Saved::Summation) b.saved = {f.s.data, f.s.rs, 1};
      if (!ends) b.ds = saved == Saved::Summation ? f.s : f.x;
      b.wants_dw = layer.w.wanted();
      b.dw = layer.w.gradient;
      if (b.wants_dw && !updates_w_ && !b.dw) b.dw = arena.template take<S>(layer.spec.out * layer.spec.in);
      if constexpr (!NARROW) b.descent = layer.w.settings && updates_w_ ? &descents_[l] : nullptr;
      b.db = layer.b.gradient;
      if (layer.b.settings) b.db = arena.template take<S>(layer.spec.out);
    }
    // ds may take the place of x(L) where f' does not read that.
    const ForwardLayer<S>& last = forward_[depth - 1];
    dy_ = saved_of(last.spec.activation) == Saved::Output ? rows_of(outputs) : last.x;
    backward_[depth - 1].ds = dy_;
    for (const Segment& segment : segments_) {
      if (has_dx(segment)) backward_[segment.first - 1].ds = rows_of(step_.layers[segment.first].spec.in);
    }
  }
  bool has_dx(const Segment& segment) const { return segment.first > lowest_; }

  void prepare_descents() {
    for (int l = 0; l < step_.depth; ++l) {
      const StepLayer<S>& layer = step_.layers[l];
      if (layer.w.settings) descents_[l] = descent_of(layer.w, layer.spec.out, layer.spec.in, 1);
    }
  }
  UpdateFunction<T> function_of(const Trained<S>& w) const {
    return wide_.update[static_cast<int>(step_.optimizer)](live_states(step_.optimizer, w.settings));
  }
  Descent<T> descent_of(const Trained<S>& w, int64_t rows, int64_t columns, double clip) {
    if (w.settings != settings_ || w.count != count_ || clip != clip_) {
      settings_ = w.settings;
      count_ = w.count;
      clip_ = clip;
      coefficients_ = coefficients_of(step_.optimizer, settings_, count_, clip);
    }
    Update<T> g{rows, columns, nullptr, 0, w.master, columns, {}, w.ld_state, coefficients_};
    if constexpr (!NARROW) {
      g.w = w.data;
      g.ld_w = w.ld;
    }
    std::copy(w.state, w.state + MAX_STATES, g.state);
    return {function_of(w), g};
  }

  Forward<S> forward_of(const Segment& segment) const {
    return {batch_.size, backward_[segment.first].x, forward_.data() + segment.first, segment.count};
  }
  // A segment's dx is the dy of the one below.
  Backward<S> backward_of(const Segment& segment) const {
    const Matrix<S>& dy = backward_[segment.first + segment.count - 1].ds;
    Backward<S> pass{batch_.size,  {dy.data, dy.rs, 1}, has_dx(segment), {}, backward_.data() + segment.first,
                     segment.count};
    if (pass.wants_dx) pass.dx = backward_[segment.first - 1].ds;
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
    const auto wide = [&](const S* from, int64_t columns, int64_t ld, T* to) {
      wide_.gather({rows, columns, from, STORED, ld, order, nullptr, nullptr, to, columns});
    };
    if (weight_) wide(batch_.weight, 1, 1, weight_);
    if (y_.data) wide(batch_.y, outputs, batch_.ld_y, y_.data);
    if constexpr (!NARROW) {
      if (!weight_) weight_ = const_cast<T*>(batch_.weight);  // only read
      if (!y_.data) y_ = {const_cast<T*>(batch_.y), batch_.ld_y, 1};
    }
    const T* weight = weight_;
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

  void gather_x(int64_t t, Range rows) const {
    constexpr size_t BYTES[] = {4, 8, 1, 2};
    const auto gather = [&](int64_t i, int64_t count, T* to, int64_t ld) {
      const char* from = static_cast<const char*>(batch_.x);
      if (!batch_.order) from += static_cast<size_t>(i * batch_.rs) * BYTES[static_cast<int>(batch_.stored)];
      wide_.gather({count, step_.layers[0].spec.in, from, batch_.stored, batch_.rs,
                    batch_.order ? batch_.order + i : nullptr, batch_.scale, batch_.shift, to, ld});
    };
    if constexpr (NARROW) {
      T* const row = rows_wide_ + t * ld_row_;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        gather(i, 1, row, 0);
        kernels_.narrow(1, step_.layers[0].spec.in, row, 0, gathered_.data + i * gathered_.rs, 0);
      }
    } else {
      gather(rows.begin, rows.size(), gathered_.data + rows.begin * gathered_.rs, gathered_.rs);
    }
  }

  // Dropout after layer l; with dx also back through it.
  void drop(int l, S* dx, int64_t ld_dx) const {
    if constexpr (!NARROW) {
      const StepLayer<S>& layer = step_.layers[l];
      const Matrix<S>& x = forward_[l].x;
      const double p = layer.dropout;
      by_rows(layer.spec.out, [&](int64_t, Range rows) {
        kernels_.dropout({rows.begin, rows.size(), layer.spec.out, x.data + rows.begin * x.rs, x.rs,
                          dx ? dx + rows.begin * ld_dx : nullptr, ld_dx, step_.seed, static_cast<uint64_t>(l),
                          static_cast<uint32_t>(std::min(p * 0x1p32, 0x1p32 - 1)),
                          p < 1 ? static_cast<T>(1 / (1 - p)) : T(0)});
      });
    }
  }

  // The loss; its derivative goes to dy.
  double losses() const {
    const Objective<T>& objective = step_.objective;
    const Matrix<S>& s = forward_[step_.depth - 1].x;
    const int64_t outputs = step_.layers[step_.depth - 1].spec.out;
    double sums[MOST_THREADS] = {};
    by_rows(outputs, [&](int64_t t, Range rows) {
      S *const from = s.data + rows.begin * s.rs, *const to = dy_.data + rows.begin * dy_.rs;
      LossBlock<T> block{};
      block.rows = rows.size();
      block.columns = outputs;
      if constexpr (NARROW) {
        block.s = block.ds = scores_.data + rows.begin * outputs;
        block.ld_s = block.ld_ds = outputs;
        kernels_.widen(rows.size(), outputs, from, s.rs, block.ds, outputs);
      } else {
        block.s = from;
        block.ld_s = s.rs;
        block.ds = to;
        block.ld_ds = dy_.rs;
      }
      if (y_.data) block.y = y_.data + rows.begin * y_.rs;
      block.ld_y = y_.rs;
      if (targets_) block.target = targets_ + rows.begin;
      const T* weight = weight_ ? weight_ + rows.begin : nullptr;
      (objective.over == LossOver::Row ? block.weight : block.row_weight) = weight;
      block.parameters = objective.parameters;
      block.scale = static_cast<T>(scale_);
      block.class_weight = objective.class_weight;
      block.smoothing = objective.smoothing;
      block.ignore_index = objective.ignore_index;
      wide_.losses[static_cast<int>(objective.loss)](block);
      if constexpr (NARROW) kernels_.narrow(rows.size(), outputs, block.ds, outputs, to, dy_.rs);
      sums[t] = block.sum;
    });
    double sum = 0;
    for (const double of_thread : sums) sum += of_thread;
    return sum * scale_;
  }

  template <class F>
  void each_parameter(F f) const {
    for (int l = 0; l < step_.depth; ++l) {
      const StepLayer<S>& layer = step_.layers[l];
      if (layer.w.settings && !backward_[l].descent) f(layer.w, backward_[l].dw, layer.spec.out, layer.spec.in);
      if (layer.b.settings) f(layer.b, backward_[l].db, int64_t{1}, layer.spec.out);
    }
  }
  // f(i, count, dw, ld) for rows of a gradient, widened where it is stored narrow.
  template <class F>
  void each_row(int64_t t, const S* gradient, Range rows, int64_t columns, F f) const {
    if constexpr (NARROW) {
      T* const row = rows_wide_ + t * ld_row_;
      for (int64_t i = rows.begin; i < rows.end; ++i) {
        kernels_.widen(1, columns, gradient + i * columns, 0, row, 0);
        f(i, int64_t{1}, row, columns);
      }
    } else {
      f(rows.begin, rows.size(), gradient + rows.begin * columns, columns);
    }
  }
  double norm() const {
    double sum = 0;
    each_parameter([&](const Trained<S>&, const S* gradient, int64_t rows, int64_t columns) {
      each_row(0, gradient, {0, rows}, columns, [&](int64_t, int64_t count, const T* dw, int64_t ld) {
        sum += wide_.sum_of_squares({dw, ld, 1}, count, columns);
      });
    });
    return std::sqrt(sum);
  }
  // What the backward pass has not updated.
  void update(double clip) {
    each_parameter([&](const Trained<S>& w, const S* gradient, int64_t rows, int64_t columns) {
      const Descent<T> descent = descent_of(w, rows, columns, clip);
      const int64_t threads = threads_for(rows * columns);
      run(parallel_, threads, [&](int64_t t) {
        each_row(t, gradient, part(rows, 1, t, threads), columns,
                 [&](int64_t i, int64_t count, const T* dw, int64_t ld) {
                   descent(i, 0, count, columns, dw, ld);
                   if constexpr (NARROW) {
                     kernels_.narrow(1, columns, w.master + i * columns, 0, w.data + i * w.ld, 0);
                   }
                 });
      });
    });
  }

  const KernelsOf<S>& kernels_;
  const Kernels<T>& wide_;
  const Step<S>& step_;
  const Batch<S>& batch_;
  const Parallel& parallel_;
  Memory& memory_;
  std::vector<ForwardLayer<S>> forward_;
  std::vector<BackwardLayer<S>> backward_;
  std::vector<Descent<T>> descents_;
  const bool updates_w_;  // in the backward pass; not where gradients are to be shortened first
  std::vector<Segment> segments_;
  Matrix<const S> x_;
  Matrix<S> gathered_, dy_;
  Matrix<T> y_, scores_;
  T *weight_ = nullptr, *rows_wide_ = nullptr;  // and a wide row for each thread
  int64_t ld_row_ = 0;
  int64_t* target_ = nullptr;
  const int64_t* targets_ = nullptr;
  int64_t kept_ = 0;
  // Of the last parameter looked at: most have the same.
  const double* settings_ = nullptr;
  int64_t count_ = 0;
  double clip_ = 0;
  Coefficients coefficients_{};
  double scale_ = 1;
  int lowest_ = 0;
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

template <class S>
StepResult step(const KernelsOf<S>& kernels, const Kernels<Wide<S>>& wide, const Step<S>& step,
                const Parallel& parallel, Memory& memory) {
  return StepRun<S>(kernels, wide, step, parallel, memory)();
}

#define PYPERC_INSTANTIATE(S) \
  template StepResult step<S>(const KernelsOf<S>&, const Kernels<Wide<S>>&, const Step<S>&, const Parallel&, Memory&);
PYPERC_INSTANTIATE(float)
PYPERC_INSTANTIATE(double)
PYPERC_INSTANTIATE(BFloat16)

}  // namespace pyperc
