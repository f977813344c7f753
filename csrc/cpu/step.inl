// The elementwise passes of a training step: the optimisers' updates, rows of a data set as they are wanted, dropout.
// Included inside the anonymous namespace of an ISA file, after value.inl.

template <class T, class O, int LIVE>
void update(const Update<T>& given) {
  constexpr int W = WIDTH<T>;
  const Update<T> g = given;  // in registers, as no store can change it
  const Coefficients c = g.coefficients;
  for (int64_t i = 0; i < g.rows; ++i) {
    const T* dw = g.dw + i * g.ld_dw;
    T *w = g.w + i * g.ld_w, *states[MAX_STATES] = {};
    PYPERC_UNROLL
    for (int s = 0; s < LIVE; ++s) states[s] = g.state[s] + i * g.ld_state;
    const auto one = [&](auto read, auto write, int64_t j) __attribute__((always_inline)) {
      const Value<T> zero(Vector<T>{});
      Value<T> state[] = {zero, zero, zero};
      PYPERC_UNROLL
      for (int s = 0; s < LIVE; ++s) state[s] = Value<T>(read(states[s] + j));
      const Value<T> after = O::template update<LIVE>(Value<T>(read(w + j)), Value<T>(read(dw + j)), state, c);
      PYPERC_UNROLL
      for (int s = 0; s < LIVE; ++s) write(states[s] + j, state[s].v);
      write(w + j, after.v);
    };
    int64_t j = 0;
    for (; j + W <= g.columns; j += W) {
      one([](const T* p) __attribute__((always_inline)) { return load(p); },
          [](T* p, Vector<T> v) __attribute__((always_inline)) { store(p, v); }, j);
    }
    if (const int tail = static_cast<int>(g.columns - j)) {
      one([=](const T* p) __attribute__((always_inline)) { return load_partial(p, tail); },
          [=](T* p, Vector<T> v) __attribute__((always_inline)) { store_partial(p, v, tail); }, j);
    }
  }
}

template <class T, class O>
UpdateFunction<T> update_of(int live) {
  return live == O::LEAST ? update<T, O, O::LEAST> : update<T, O, O::LEAST + 1>;
}

// The sum of squares of a rows x columns block, in double.
template <class T>
double sum_of_squares(Matrix<const T> x, int64_t rows, int64_t columns) {
  constexpr int W = WIDTH<T>;
  constexpr int64_t BLOCK = 32 * W;  // elements summed in T before they go into the double
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    const T* row = x.data + i * x.rs;
    for (int64_t j = 0; j < columns;) {
      const int64_t end = columns - j > BLOCK ? j + BLOCK : columns;
      Vector<T> sums{};
      for (; j + W <= end; j += W) sums = fma(load(row + j), load(row + j), sums);
      total += static_cast<double>(sum<T>(sums));
      if (const int tail = static_cast<int>(end - j)) {
        const Vector<T> last = load_partial(row + j, tail);
        total += sum_of_lanes<T>(last * last, tail);
        j = end;
      }
    }
  }
  return total;
}

template <class T, class S>
PYPERC_INLINE T number(S x) {
  return static_cast<T>(x);
}
template <class T>
PYPERC_INLINE T number(BFloat16 x) {
  return static_cast<T>(__builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16));
}

// Plain loops, which the compiler makes vectors of.
template <class T, class S>
PYPERC_INLINE void gather_rows(const Gather<T>& g) {
  const S* in = static_cast<const S*>(g.in);
  const auto row = [&](int64_t i) __attribute__((always_inline)) { return in + (g.order ? g.order[i] : i) * g.ld_in; };
  constexpr int64_t LINE = 64 / static_cast<int64_t>(sizeof(S));
  for (int64_t i = 0; i < g.rows; ++i) {
    const S* from = row(i);
    T* out = g.out + i * g.ld_out;
    if (g.order && i + 1 < g.rows) {
      // Rows lie anywhere: the next one is on its way while this one is read.
      const S* next = row(i + 1);
      for (int64_t j = 0; j < g.columns; j += LINE) __builtin_prefetch(next + j);
    }
    if (g.scale) {
      for (int64_t j = 0; j < g.columns; ++j) out[j] = number<T>(from[j]) * g.scale[j] + g.shift[j];
    } else {
      for (int64_t j = 0; j < g.columns; ++j) out[j] = number<T>(from[j]);
    }
  }
}
template <class T>
void gather(const Gather<T>& g) {
  switch (g.stored) {
    case Stored::Float32: return gather_rows<T, float>(g);
    case Stored::Float64: return gather_rows<T, double>(g);
    case Stored::UInt8: return gather_rows<T, uint8_t>(g);
    case Stored::BFloat16: return gather_rows<T, BFloat16>(g);
  }
}

template <class T>
void dropout(const Dropout<T>& g) {
  const T scale = g.scale, undo = scale > T(0) ? T(1) / scale : T(0);
  for (int64_t i = 0; i < g.rows; ++i) {
    const uint64_t key = row_key(g.seed, g.layer, static_cast<uint64_t>(g.first + i));
    T* x = g.x + i * g.ld_x;
    if (T* dx = g.dx ? g.dx + i * g.ld_dx : nullptr) {
      for (int64_t j = 0; j < g.columns; ++j) {
        dx[j] = random_bits(key, static_cast<uint32_t>(j)) < g.threshold ? T(0) : dx[j] * scale;
        x[j] *= undo;
      }
    } else {
      for (int64_t j = 0; j < g.columns; ++j) {
        x[j] = random_bits(key, static_cast<uint32_t>(j)) < g.threshold ? T(0) : x[j] * scale;
      }
    }
  }
}
