// The right-hand side of a product, packed into the panels that gemm.inl draws. Included inside the anonymous namespace
// of an ISA file.

// W x W blocks of the transpose of b, through registers; out has rows of `panel` elements.
template <class T>
void pack_transposed(const T* b, int64_t cs, int64_t k, int64_t columns, int64_t panel, T* out) {
  constexpr int W = WIDTH<T>;
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    int64_t p = 0;
    for (; p + W <= k; p += W) {
      Vector<T> rows[W];
      PYPERC_UNROLL
      for (int i = 0; i < W; ++i) rows[i] = load(b + (j + i) * cs + p);
      transpose<T>(rows);
      PYPERC_UNROLL
      for (int i = 0; i < W; ++i) store(out + (p + i) * panel + j, rows[i]);
    }
    for (; p < k; ++p) {
      for (int i = 0; i < W; ++i) out[p * panel + j + i] = b[(j + i) * cs + p];
    }
  }
  for (; j < columns; ++j) {
    for (int64_t p = 0; p < k; ++p) out[p * panel + j] = b[j * cs + p];
  }
}

// Panels of contiguous rows, a few side by side, so that a row's page is visited once for all of them.
template <class T>
void pack_rows(const T* b, int64_t rs, int64_t k, int64_t panels, int64_t panel, T* packed) {
  constexpr int64_t AHEAD = 16;
  for (int64_t p = 0; p < k; ++p, b += rs) {
    const T* from = b;
    for (int64_t q = 0; q < panels; ++q, from += panel) {
      T* to = packed + (q * k + p) * panel;
      for (int64_t i = 0; i < panel; i += WIDTH<T>) {
        __builtin_prefetch(from + i + AHEAD * rs, 0, 2);
        store(to + i, load(from + i));
      }
    }
  }
}

template <class T>
void pack(Matrix<const T> b, int64_t k, int64_t n, int64_t panel, T* packed) {
  constexpr int64_t PANELS = 4;
  for (int64_t j = 0, taken; j < n; j += taken, packed += k * taken) {
    const int64_t columns = n - j < panel ? n - j : panel;
    const T* from = b.data + j * b.cs;
    taken = panel;
    if (b.rs == 1 && b.cs != 1) {
      pack_transposed(from, b.cs, k, columns, panel, packed);
    } else if (b.cs == 1 && columns == panel) {
      const int64_t whole = (n - j) / panel, panels = whole < PANELS ? whole : PANELS;
      pack_rows(from, b.rs, k, panels, panel, packed);
      taken = panels * panel;
    } else {
      for (int64_t p = 0; p < k; ++p) {
        for (int64_t i = 0; i < columns; ++i) packed[p * panel + i] = from[p * b.rs + i * b.cs];
      }
    }
  }
}
