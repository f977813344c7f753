// The losses' values and derivatives, and the passes of the linear models over rows of x. Included inside the anonymous
// namespace of an ISA file, after gemm.inl.

// x . w, in four sums.
template <class T>
PYPERC_INLINE T dot_product(const T* x, const T* w, int64_t n) {
  constexpr int W = WIDTH<T>;
  Vector<T> acc[4] = {};
  int64_t j = 0;
  for (; j + 4 * W <= n; j += 4 * W) {
    PYPERC_UNROLL
    for (int u = 0; u < 4; ++u) acc[u] = fma(load(x + j + u * W), load(w + j + u * W), acc[u]);
  }
  for (; j + W <= n; j += W) acc[0] = fma(load(x + j), load(w + j), acc[0]);
  if (const int tail = static_cast<int>(n - j)) {
    acc[1] = fma(load_partial(x + j, tail), load_partial(w + j, tail), acc[1]);
  }
  return sum<T>((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// x . w and x . v, x being read once.
template <class T>
PYPERC_INLINE T dot_products(const T* x, const T* w, const T* v, int64_t n, T& second) {
  constexpr int W = WIDTH<T>;
  Vector<T> acc[2] = {}, other[2] = {};
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    PYPERC_UNROLL
    for (int u = 0; u < 2; ++u) {
      const Vector<T> row = load(x + j + u * W);
      acc[u] = fma(row, load(w + j + u * W), acc[u]);
      other[u] = fma(row, load(v + j + u * W), other[u]);
    }
  }
  for (; j + W <= n; j += W) {
    acc[0] = fma(load(x + j), load(w + j), acc[0]);
    other[0] = fma(load(x + j), load(v + j), other[0]);
  }
  if (const int tail = static_cast<int>(n - j)) {
    const Vector<T> row = load_partial(x + j, tail);
    acc[1] = fma(row, load_partial(w + j, tail), acc[1]);
    other[1] = fma(row, load_partial(v + j, tail), other[1]);
  }
  second = sum<T>(other[0] + other[1]);
  return sum<T>(acc[0] + acc[1]);
}

// w += a x
template <class T>
PYPERC_INLINE void add_scaled(T a, const T* x, T* w, int64_t n) {
  constexpr int W = WIDTH<T>;
  const Vector<T> scale = splat<Vector<T>>(a);
  int64_t j = 0;
  for (; j + W <= n; j += W) store(w + j, fma(scale, load(x + j), load(w + j)));
  if (const int tail = static_cast<int>(n - j)) {
    store_partial(w + j, fma(scale, load_partial(x + j, tail), load_partial(w + j, tail)), tail);
  }
}

template <class T>
PYPERC_INLINE double sum_of_lanes(Vector<T> v, int lanes) {
  T lane[WIDTH<T>];
  store(lane, v);
  double sum = 0;
  for (int i = 0; i < lanes; ++i) sum += static_cast<double>(lane[i]);
  return sum;
}

template <class T, class L>
void element_loss(LossBlock<T>& g) {
  constexpr int W = WIDTH<T>;
  constexpr int64_t BLOCK = 32 * W;  // elements summed in T before they go into the double
  const Parameters parameters = g.parameters;
  const Vector<T> scale = splat<Vector<T>>(g.scale);
  for (int64_t i = 0; i < g.rows; ++i) {
    const T *s = g.s + i * g.ld_s, *y = g.y + i * g.ld_y, *weight = g.weight ? g.weight + i * g.ld_weight : nullptr;
    T *value = g.value ? g.value + i * g.ld_value : nullptr, *ds = g.ds ? g.ds + i * g.ld_ds : nullptr;
    const auto one = [&](auto read, auto write, int64_t j) __attribute__((always_inline)) {
      const Value<T> score(read(s + j)), target(read(y + j));
      Vector<T> loss = L::value(score, target, parameters).v;
      const Vector<T> factor = weight ? read(weight + j) : splat<Vector<T>>(g.row_weight ? g.row_weight[i] : T(1));
      loss *= factor;
      if (value) write(value + j, loss);
      if (ds) write(ds + j, L::derivative(score, target, parameters).v * (factor * scale));
      return loss;
    };
    int64_t j = 0;
    while (j + W <= g.columns) {
      const int64_t end = g.columns - j > BLOCK ? j + BLOCK : g.columns;
      Vector<T> total{};
      for (; j + W <= end; j += W) {
        total += one([](const T* p) __attribute__((always_inline)) { return load(p); },
                     [](T* p, Vector<T> v) __attribute__((always_inline)) { store(p, v); }, j);
      }
      g.sum += static_cast<double>(sum<T>(total));
    }
    if (const int tail = static_cast<int>(g.columns - j)) {
      const Vector<T> last =
          one([=](const T* p) __attribute__((always_inline)) { return load_partial(p, tail); },
              [=](T* p, Vector<T> v) __attribute__((always_inline)) { store_partial(p, v, tail); }, j);
      g.sum += sum_of_lanes<T>(last, tail);
    }
  }
}

// The largest element; a NaN is passed over, it comes up again in the sum of the decays.
template <class T>
PYPERC_INLINE T highest_of(const T* s, int64_t n) {
  constexpr int W = WIDTH<T>;
  int64_t c = 0;
  T highest = s[0];
  if (n >= W) {
    Vector<T> most = load(s);
    for (c = W; c + W <= n; c += W) most = max(load(s + c), most);
    most = max(load(s + n - W), most);
    T lane[W];
    store(lane, most);
    highest = lane[0];
    for (int i = 1; i < W; ++i) highest = lane[i] > highest ? lane[i] : highest;
  } else {
    for (c = 1; c < n; ++c) highest = s[c] > highest ? s[c] : highest;
  }
  return highest;
}

// The target distribution q of row i, where it is not one class alone: class_weight * (smoothing / classes + (1 -
// smoothing) p), p being the row of y or 1 at the target. `each(c, count, q)` is shown vectors of it without the 1.
template <class T, class F>
PYPERC_INLINE void each_of_spread(const LossBlock<T>& g, int64_t i, F each) {
  constexpr int W = WIDTH<T>;
  const T* y = g.target ? nullptr : g.y + i * g.ld_y;
  const Vector<T> even = splat<Vector<T>>(static_cast<T>(g.smoothing / static_cast<double>(g.columns)));
  const Vector<T> keep = splat<Vector<T>>(static_cast<T>(1 - g.smoothing));
  int64_t c = 0;
  for (; c + W <= g.columns; c += W) {
    Vector<T> q = y ? fma(load(y + c), keep, even) : even;
    if (g.class_weight) q *= load(g.class_weight + c);
    each(c, W, q);
  }
  if (const int tail = static_cast<int>(g.columns - c)) {
    Vector<T> q = y ? fma(load_partial(y + c, tail), keep, even) : even;
    if (g.class_weight) q *= load_partial(g.class_weight + c, tail);
    each(c, tail, q);
  }
}

// L as CrossEntropy. With the target distribution q and its sum Q (1 at the target and 1, but for smoothing, weights
// and probabilities): Q log sum_c e^s_c - sum_c q_c s_c; the derivative is Q softmax - q.
template <class T, class L>
void row_loss(LossBlock<T>& g) {
  constexpr int W = WIDTH<T>;
  const bool spread = g.smoothing > 0 || !g.target;
  for (int64_t i = 0; i < g.rows; ++i) {
    const T* s = g.s + i * g.ld_s;
    T* ds = g.ds ? g.ds + i * g.ld_ds : nullptr;
    const int64_t target = g.target ? g.target[i] : -1;
    if (g.target && target == g.ignore_index) {
      if (ds) __builtin_memset(ds, 0, static_cast<size_t>(g.columns) * sizeof(T));
      if (g.value) g.value[i * g.ld_value] = T(0);
      continue;
    }
    const T weight = g.weight ? g.weight[i] : T(1);
    const T highest = highest_of(s, g.columns);
    const Value<T> top(splat<Vector<T>>(highest));
    // The part of the target that one class has.
    const T own = g.target ? static_cast<T>(1 - g.smoothing) * (g.class_weight ? g.class_weight[target] : T(1)) : T(0);
    T total = own, margin = g.target ? own * (highest - s[target]) : T(0);
    if (spread) {
      each_of_spread(g, i, [&](int64_t c, int count, Vector<T> q) __attribute__((always_inline)) {
        const Vector<T> part = q * (top.v - (count == W ? load(s + c) : load_partial(s + c, count)));
        if (count == W) {
          total += sum<T>(q);
          margin += sum<T>(part);
        } else {
          total += static_cast<T>(sum_of_lanes<T>(q, count));
          margin += static_cast<T>(sum_of_lanes<T>(part, count));
        }
      });
    }
    Vector<T> decays{};
    int64_t c = 0;
    for (; c + W <= g.columns; c += W) {
      const Vector<T> e = L::decay(Value<T>(load(s + c)), top).v;
      if (ds) store(ds + c, e);
      decays += e;
    }
    T sum_of_decays = sum<T>(decays);
    if (const int tail = static_cast<int>(g.columns - c)) {
      const Vector<T> e = L::decay(Value<T>(load_partial(s + c, tail)), top).v;
      if (ds) store_partial(ds + c, e, tail);
      sum_of_decays += static_cast<T>(sum_of_lanes<T>(e, tail));
    }
    if (ds) {
      const T factor = weight * g.scale;
      const Vector<T> factors = splat<Vector<T>>(factor * total / sum_of_decays);
      for (c = 0; c + W <= g.columns; c += W) store(ds + c, load(ds + c) * factors);
      if (const int tail = static_cast<int>(g.columns - c)) {
        store_partial(ds + c, load_partial(ds + c, tail) * factors, tail);
      }
      if (spread) {
        const Vector<T> all = splat<Vector<T>>(factor);
        each_of_spread(g, i, [&](int64_t c, int count, Vector<T> q) __attribute__((always_inline)) {
          if (count == W) {
            store(ds + c, load(ds + c) - all * q);
          } else {
            store_partial(ds + c, load_partial(ds + c, count) - all * q, count);
          }
        });
      }
      if (g.target) ds[target] -= factor * own;
    }
    const Vector<T> logarithm = L::value(Value<T>(splat<Vector<T>>(sum_of_decays)), Value<T>(Vector<T>{})).v;
    T lane[W];
    store(lane, logarithm);
    const T loss = weight * (total * lane[0] + margin);
    if (g.value) g.value[i * g.ld_value] = loss;
    g.sum += static_cast<double>(loss);
  }
}

template <class T, class L>
constexpr LossFunction<T> loss_function() {
  if constexpr (L::over == LossOver::Row) {
    return row_loss<T, L>;
  } else {
    return element_loss<T, L>;
  }
}
template <class T>
constexpr LossFunction<T> LOSSES[] = {
#define X(L) loss_function<T, pyperc::L>(),
    PYPERC_LOSSES(X)
#undef X
};

// s[r] = x_r . w + b for ROWS rows: w is read once for all of them.
template <class T, int ROWS>
PYPERC_INLINE void scores_of_rows(const T* x, int64_t ld, const T* w, T b, int64_t n, T* s) {
  constexpr int W = WIDTH<T>;
  Vector<T> acc[ROWS] = {};
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    const Vector<T> v = load(w + j);
    PYPERC_UNROLL
    for (int r = 0; r < ROWS; ++r) acc[r] = fma(load(x + r * ld + j), v, acc[r]);
  }
  if (const int tail = static_cast<int>(n - j)) {
    const Vector<T> v = load_partial(w + j, tail);
    PYPERC_UNROLL
    for (int r = 0; r < ROWS; ++r) acc[r] = fma(load_partial(x + r * ld + j, tail), v, acc[r]);
  }
  PYPERC_UNROLL
  for (int r = 0; r < ROWS; ++r) s[r] = b + sum<T>(acc[r]);
}

// dw[c] += sum over ROWS rows of ds[r, c] x_r for all classes, the rows being in the first-level cache. Meanwhile the
// rows that come next are fetched, so that memory does not wait for this arithmetic.
template <class T, int ROWS>
PYPERC_INLINE void add_rows(const T* x, int64_t ld, const T* ds, int64_t ld_ds, int64_t classes, int64_t n, T* dw,
                            int64_t ahead) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    Vector<T> row[ROWS];
    PYPERC_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      row[r] = load(x + r * ld + j);
      if (ahead) __builtin_prefetch(x + (r + ahead) * ld + j);
    }
    for (int64_t c = 0; c < classes; ++c) {
      Vector<T> acc = load(dw + c * n + j);
      PYPERC_UNROLL
      for (int r = 0; r < ROWS; ++r) acc = fma(splat<Vector<T>>(ds[r * ld_ds + c]), row[r], acc);
      store(dw + c * n + j, acc);
    }
  }
  if (const int tail = static_cast<int>(n - j)) {
    for (int64_t c = 0; c < classes; ++c) {
      Vector<T> acc = load_partial(dw + c * n + j, tail);
      for (int r = 0; r < ROWS; ++r) {
        acc = fma(splat<Vector<T>>(ds[r * ld_ds + c]), load_partial(x + r * ld + j, tail), acc);
      }
      store_partial(dw + c * n + j, acc, tail);
    }
  }
}

template <class T>
void linear_rows(LinearRows<T>& g) {
  constexpr int ROWS = LinearRows<T>::ROWS;
  const int64_t n = g.columns, classes = g.classes;
  const LossFunction<T> loss = LOSSES<T>[static_cast<int>(g.loss)];
  T *s = g.workspace, *ds = s + LinearRows<T>::workspace_size(classes) / 4;
  T *y = ds + LinearRows<T>::workspace_size(classes) / 4, *weight = y + LinearRows<T>::workspace_size(classes) / 4;
  const bool one_against_rest = !g.y && g.loss != Loss::CrossEntropy;
  for (int64_t i = 0; i < g.rows; i += ROWS) {
    const T* x = g.x + i * g.ld;
    const int rows = g.rows - i < ROWS ? static_cast<int>(g.rows - i) : ROWS;
    if (classes == 1) {
      const T b = g.b ? g.b[0] : T(0);
      if (rows == ROWS) {
        scores_of_rows<T, ROWS>(x, g.ld, g.w, b, n, s);
      } else {
        for (int r = 0; r < rows; ++r) scores_of_rows<T, 1>(x + r * g.ld, g.ld, g.w, b, n, s + r);
      }
    } else {
      Gemm<T> product{};
      product.m = rows;
      product.n = classes;
      product.k = n;
      product.a = {x, g.ld, 1};
      product.b = g.w;
      product.ldb = n;
      product.c = s;
      product.ldc = classes;
      product.init = g.b;
      dot(product);
    }
    LossBlock<T> block{};
    block.s = s;
    block.ds = ds;
    block.scale = T(1);
    block.parameters = g.parameters;
    if (one_against_rest) {
      // Targets and weights of the block as a matrix; then it is one row of rows * classes elements.
      for (int r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < classes; ++c) {
          const bool own = g.target[i + r] == c;
          y[r * classes + c] = own ? T(1) : T(-1);
          weight[r * classes + c] = (g.weight ? g.weight[i + r] : T(1)) * (own && g.positive ? g.positive[c] : T(1));
        }
      }
      block.rows = 1;
      block.columns = rows * classes;
      block.y = y;
      block.weight = weight;
    } else if (g.loss == Loss::CrossEntropy) {
      block.rows = rows;
      block.columns = block.ld_s = block.ld_ds = classes;
      block.target = g.target + i;
      block.weight = g.weight ? g.weight + i : nullptr;
    } else {
      block.rows = 1;
      block.columns = rows;
      block.y = g.y + i;
      block.weight = g.weight ? g.weight + i : nullptr;
    }
    loss(block);
    g.value += block.sum;
    for (int64_t c = 0; c < classes; ++c) {
      T sum_of_ds = T(0);
      for (int r = 0; r < rows; ++r) sum_of_ds += ds[r * classes + c];
      g.db[c] += sum_of_ds;
    }
    if (rows == ROWS) {
      add_rows<T, ROWS>(x, g.ld, ds, classes, classes, n, g.dw, g.rows - i >= 2 * ROWS ? ROWS : 0);
    } else {
      for (int r = 0; r < rows; ++r) add_rows<T, 1>(x + r * g.ld, g.ld, ds + r * classes, classes, classes, n, g.dw, 0);
    }
  }
}

// The products' part of w . x, and with BOTH of `first` . x.
template <class T, bool BOTH>
PYPERC_INLINE T score_of_products(const Products& p, const T* x, const T* w, const T* first, T& score_of_first) {
  T score = T(0);
  for (int64_t g = 0; g < p.groups; ++g) {
    const T u = x[p.first[g]];
    if (u == T(0)) continue;
    T inner = T(0), again = T(0);
    for (int32_t k = p.begin[g]; k < p.begin[g + 1]; ++k) {
      const T v = x[p.second[k]];
      inner += w[k] * v;
      if constexpr (BOTH) again += first[k] * v;
    }
    score += u * inner;
    if constexpr (BOTH) score_of_first += u * again;
  }
  return score;
}

template <class T>
PYPERC_INLINE void add_products(const Products& p, T a, const T* x, T* w) {
  for (int64_t g = 0; g < p.groups; ++g) {
    const T u = x[p.first[g]];
    if (u == T(0)) continue;
    for (int32_t k = p.begin[g]; k < p.begin[g + 1]; ++k) w[k] += a * (u * x[p.second[k]]);
  }
}

template <class T>
void perceptron_rows(PerceptronRows<T>& g) {
  const int64_t n = g.columns;
  for (int64_t at = g.begin; at < g.end; ++at, ++g.step) {
    const int64_t i = g.order ? g.order[at] : at;
    const T* x = g.x + i * g.ld;
    // Until the first change the weights are still those that the epoch began with.
    const bool changed = g.scores && g.count;
    T score_of_first = T(0);
    T score = changed ? dot_products(x, g.w, g.first, n, score_of_first) : dot_product(x, g.w, n);
    if (g.products.count) {
      score += changed ? score_of_products<T, true>(g.products, x, g.w + n, g.first + n, score_of_first)
                       : score_of_products<T, false>(g.products, x, g.w + n, nullptr, score_of_first);
    }
    if (g.b) score += *g.b;
    if (g.scores) g.scores[i * g.ld_scores] = changed ? score_of_first + g.first_b : score;
    const bool own = g.target[i] == g.positive;
    const T weight = (g.weight ? g.weight[i] : T(1)) * (own ? g.own : T(1)), y = own ? T(1) : T(-1);
    // Written so that a NaN is a change: an overflow must not look like convergence.
    if (y * score > T(0) || weight == T(0)) continue;
    const T a = g.eta * y * weight;
    add_scaled(a, x, g.w, n);
    if (g.products.count) add_products(g.products, a, x, g.w + n);
    if (g.b) *g.b += a;
    if (g.sum) {
      const T late = a * static_cast<T>(g.step);
      add_scaled(late, x, g.sum, n);
      if (g.products.count) add_products(g.products, late, x, g.sum + n);
      *g.sum_b += late;
    }
    ++g.count;
  }
}

// xorshift64*, Vigna 2014.
PYPERC_INLINE uint64_t next_random(uint64_t& state) {
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return state * 0x2545F4914F6CDD1Dull;
}

template <class T>
void dual_descent(DualDescent<T>& g) {
  constexpr double INFINITE = __builtin_inf();
  const int64_t n = g.columns;
  uint64_t random = g.seed * 2 + 1;
  for (int64_t i = 0; i < g.rows; ++i) {
    const T* x = g.x + i * g.ld;
    g.norm[i] = dot_product(x, x, n) + static_cast<T>(g.bias);
    g.index[i] = static_cast<int32_t>(i);
  }
  const auto swap = [&](int64_t a, int64_t b) __attribute__((always_inline)) {
    const int32_t t = g.index[a];
    g.index[a] = g.index[b];
    g.index[b] = t;
  };
  int64_t active = g.rows;
  double highest_before = INFINITE, lowest_before = -INFINITE;
  for (g.epochs = 0; g.epochs < g.max_epochs;) {
    double highest = -INFINITE, lowest = INFINITE;
    for (int64_t s = 0; s < active; ++s) swap(s, s + static_cast<int64_t>(next_random(random) % (active - s)));
    for (int64_t s = 0; s < active; ++s) {
      const int64_t i = g.index[s];
      if (s + 1 < active) {
        const T* next = g.x + g.index[s + 1] * g.ld;
        for (int64_t j = 0; j < n; j += static_cast<int64_t>(64 / sizeof(T))) __builtin_prefetch(next + j);
      }
      const T* x = g.x + i * g.ld;
      const double y = static_cast<double>(g.y[i]), upper = static_cast<double>(g.upper[i]), alpha = g.alpha[i];
      if (upper == 0) continue;
      const double slope = y * (static_cast<double>(dot_product(x, g.w, n)) + g.b) - 1;
      double projected = slope;
      if (alpha == 0) {
        if (slope > highest_before) {
          swap(s--, --active);
          continue;
        }
        projected = slope < 0 ? slope : 0;
      } else if (alpha == upper) {
        if (slope < lowest_before) {
          swap(s--, --active);
          continue;
        }
        projected = slope > 0 ? slope : 0;
      }
      highest = projected > highest ? projected : highest;
      lowest = projected < lowest ? projected : lowest;
      if (projected < 1e-12 && projected > -1e-12) continue;
      double moved = alpha - slope / static_cast<double>(g.norm[i]);
      moved = moved < 0 ? 0 : moved > upper ? upper : moved;
      g.alpha[i] = moved;
      const double d = (moved - alpha) * y;
      add_scaled(static_cast<T>(d), x, g.w, n);
      g.b += d * g.bias;
    }
    ++g.epochs;
    g.violation = highest > lowest ? highest - lowest : 0;
    if (g.violation <= g.tolerance) {
      if (active == g.rows) return;
      active = g.rows;
      highest_before = INFINITE;
      lowest_before = -INFINITE;
      // The whole set decides whether it is over.
      g.violation = INFINITE;
      continue;
    }
    highest_before = highest > 0 ? highest : INFINITE;
    lowest_before = lowest < 0 ? lowest : -INFINITE;
  }
}
