// A tile of a matrix in shared memory, how it gets there, and the fragments that the matrix instructions read from it.
//
// A row is cut into pieces of 16 bytes. Piece p of a row lies at place p ^ (a function of the row), so that the 8 rows
// that one ldmatrix reads at the same p lie in 8 different groups of banks: nothing is padded, and nothing conflicts.
#pragma once

#include "primitives.cuh"

namespace pyperc::cuda {

// How much of `most` is left.
PYPERC_DEVICE int limited(int64_t left, int most) { return left < most ? static_cast<int>(left) : most; }

template <class T, int ROWS_, int COLUMNS_>
struct Tile {
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int PIECE = Vector<T>::SIZE, PIECES = COLUMNS / PIECE;
  static constexpr int SIZE = ROWS * COLUMNS;  // elements; in bytes a multiple of 128
  static_assert(COLUMNS % PIECE == 0 && (PIECES & (PIECES - 1)) == 0, "a power of two of pieces");

  T* data;

  // Unsigned, so that the compiler sees how little of the address changes from one tile row to the next.
  PYPERC_DEVICE static uint32_t swizzle(uint32_t row) {
    constexpr uint32_t CYCLE = PIECES < 8 ? PIECES : 8, ROWS_IN_ALL_BANKS = 8 / CYCLE;
    return row / ROWS_IN_ALL_BANKS % CYCLE;
  }
  PYPERC_DEVICE T* at(int row, int piece) const {
    const auto r = static_cast<uint32_t>(row), p = static_cast<uint32_t>(piece);
    return data + (r * PIECES + (p ^ swizzle(r))) * PIECE;
  }
  PYPERC_DEVICE T* element(int row, int column) const {
    const auto c = static_cast<uint32_t>(column);
    return at(row, static_cast<int>(c / PIECE)) + c % PIECE;
  }
  // The same for column first + c, where `first` is a multiple of 16 and c less: what does not depend on it stays
  // apart, so that a loop over it changes one term.
  PYPERC_DEVICE T* element(int row, int first, int c) const {
    const auto r = static_cast<uint32_t>(row), f = static_cast<uint32_t>(first), rest = static_cast<uint32_t>(c);
    return data + r * COLUMNS + ((f / PIECE) ^ (rest / PIECE ^ swizzle(r))) * PIECE + rest % PIECE;
  }

  // Starts the copy of rows of `global`, ld elements apart, of which `rows` by `columns` exist (the others become
  // zero); they begin at multiples of 16 bytes. Shared by THREADS threads, numbered t.
  template <int THREADS>
  PYPERC_DEVICE void copy(const T* global, int64_t ld, int rows, int columns, int t) const {
    PYPERC_UNROLL
    for (int i = 0; i < divide_up(ROWS * PIECES, THREADS); ++i) {
      const int n = t + i * THREADS, row = n / PIECES, piece = n % PIECES;
      if (ROWS * PIECES % THREADS && n >= ROWS * PIECES) break;
      const int left = row < rows ? columns - piece * PIECE : 0;
      const int valid = left >= PIECE ? PIECE : left > 0 ? left : 0;
      const T* from = valid ? global + row * ld + piece * PIECE : global;
      copy_async<16>(at(row, piece), from, valid * static_cast<int>(sizeof(T)));
    }
  }

  // A's 16 x 16 (TF32: 16 x 8) from [m, k] at row m, piece k / PIECE; and, 16 bits only, from [k, m] at column `m`, a
  // multiple of 16.
  PYPERC_DEVICE FragmentA a(int m, int piece) const {
    FragmentA f;
    ldmatrix(f.r, at(m + lane() % 16, piece + lane() / 16));
    return f;
  }
  PYPERC_DEVICE FragmentA a_transposed(int k, int m) const {
    FragmentA f;
    ldmatrix_transposed(f.r, element(k + lane() % 8 + lane() / 16 * 8, m, lane() / 8 % 2 * PIECE));
    return f;
  }
  // B's 16 x 16 (TF32: 8 x 16), two fragments, from [n, k] at row n, piece k / PIECE; and, 16 bits only, from [k, n] at
  // column `n`, a multiple of 16.
  PYPERC_DEVICE void b(int n, int piece, FragmentB (&f)[2]) const {
    uint32_t r[4];
    ldmatrix(r, at(n + lane() % 8 + lane() / 16 * 8, piece + lane() / 8 % 2));
    f[0] = {{r[0], r[1]}};
    f[1] = {{r[2], r[3]}};
  }
  PYPERC_DEVICE void b_transposed(int k, int n, FragmentB (&f)[2]) const {
    uint32_t r[4];
    ldmatrix_transposed(r, element(k + lane() % 16, n, lane() / 16 * PIECE));
    f[0] = {{r[0], r[1]}};
    f[1] = {{r[2], r[3]}};
  }
};

}  // namespace pyperc::cuda
