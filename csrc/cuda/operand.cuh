// A tile of an operand of a product, whichever way it lies in memory, and its fragments.
#pragma once

#include <cstring>

#include "tile.cuh"

namespace pyperc::cuda {

// [rows, columns] of any strides, element by element, zero where there is none.
template <int THREADS, class TILE, class T>
PYPERC_DEVICE void gather(const TILE& tile, const T* global, int64_t rs, int64_t cs, int rows, int columns) {
  PYPERC_NO_UNROLL
  for (int i = thread(); i < TILE::SIZE; i += THREADS) {
    const int row = i / TILE::COLUMNS, column = i % TILE::COLUMNS;
    *tile.element(row, column) = row < rows && column < columns ? global[row * rs + column * cs] : T{};
  }
}

// A tile of an operand with `rows` rows (of a; of b's transpose) and columns along k, or its transpose where the
// operand does not lie along k.
template <class T, int ROWS, int BK, bool ALONG_K>
struct OperandTile : std::conditional_t<ALONG_K, Tile<T, ROWS, BK>, Tile<T, BK, ROWS>> {
  using Base = std::conditional_t<ALONG_K, Tile<T, ROWS, BK>, Tile<T, BK, ROWS>>;

  PYPERC_DEVICE explicit OperandTile(T* data) : Base{data} {}

  template <int THREADS>
  PYPERC_DEVICE void fetch(const T* from, int64_t rs, int64_t ks, int rows, int k, bool whole) const {
    const int64_t outer = ALONG_K ? rs : ks, inner = ALONG_K ? ks : rs;
    const int height = ALONG_K ? rows : k, width = ALONG_K ? k : rows;
    if (whole) {
      Base::template copy<THREADS>(from, outer, height, width, thread());
    } else {
      gather<THREADS>(static_cast<const Base&>(*this), from, outer, inner, height, width);
    }
  }

  // Row r and column c of the operand, in TF32.
  PYPERC_DEVICE uint32_t rounded(int r, int c) const {
    return tf32(ALONG_K ? *Base::element(r, c) : *Base::element(c, r));
  }
  static PYPERC_DEVICE void round(uint32_t& r) {
    if constexpr (sizeof(T) == 4) {
      float x;
      std::memcpy(&x, &r, sizeof x);
      r = tf32(x);
    }
  }

  // The fragments of matrix step `step`: 32 bytes along k.
  PYPERC_DEVICE FragmentA as_a(int row, int step) const {
    if constexpr (!ALONG_K && sizeof(T) == 4) {
      const int r = row + lane() / 4, c = step * 8 + lane() % 4;
      return {{rounded(r, c), rounded(r + 8, c), rounded(r, c + 4), rounded(r + 8, c + 4)}};
    } else {
      FragmentA f;
      if constexpr (ALONG_K) {
        f = Base::a(row, step * 2);
      } else {
        f = Base::a_transposed(step * 16, row);
      }
      PYPERC_UNROLL
      for (uint32_t& r : f.r) round(r);
      return f;
    }
  }
  PYPERC_DEVICE void as_b(int row, int step, FragmentB (&f)[2]) const {
    if constexpr (!ALONG_K && sizeof(T) == 4) {
      const int r = row + lane() / 4, c = step * 8 + lane() % 4;
      f[0] = {{rounded(r, c), rounded(r, c + 4)}};
      f[1] = {{rounded(r + 8, c), rounded(r + 8, c + 4)}};
    } else {
      if constexpr (ALONG_K) {
        Base::b(row, step * 2, f);
      } else {
        Base::b_transposed(step * 16, row, f);
      }
      PYPERC_UNROLL
      for (FragmentB& b : f) {
        PYPERC_UNROLL
        for (uint32_t& r : b.r) round(r);
      }
    }
  }
};

}  // namespace pyperc::cuda
