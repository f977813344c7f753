// A product of matrices that are stored in 16 bits and summed in float32, in memory that a thread keeps: block by
// block, so that a pass holds no more than plain torch does.
//
//                     columns
//                    +-------+
//              depth |   b   |     A block of a and one of b are made into operands, multiplied,
//                    +-------+     and forgotten. The sums of a block of the result wait while the
//           depth                  blocks of the depth go by, and are handed over tile by tile, to
//         +-------+  +-------+     be rounded once.
//    rows |   a   |  | sums  |
//         +-------+  +-------+
#pragma once

#include <cmath>

#include "numbers.h"

namespace pyperc {

// The sizes of the blocks: as large as the memory allows, and as square, as each block of a is made again for all
// columns of the next block of b, and the other way round.
struct Blocks {
  int64_t panel;                  // columns of a panel of b
  int64_t rows, columns, depths;  // rows and columns of a block at most; in how many blocks the depth goes by

  // Of a product of m rows, n columns and k operands. `reads_a`: a lies in operands already.
  Blocks(const Tile& tile, int64_t kc, int64_t m, int64_t n, int64_t k, bool reads_a) {
    // A sum that waits is read and written once for each block of the depth: 192 multiply-adds take longer than that.
    constexpr int64_t UNSPLIT = 288, DEPTH = 192, PADDING = 32;
    panel = tile.vectors(m) * tile.width;
    int64_t room = THREAD_MEMORY / static_cast<int64_t>(sizeof(float)) - 3 * PADDING;
    if (reads_a && k <= kc && k * panel <= room) {
      depths = 1;
      rows = m;
      columns = whole_panels(room / std::max<int64_t>(1, k));
      return;
    }
    depths = k <= UNSPLIT ? 1 : (k + DEPTH - 1) / DEPTH;
    const int64_t depth = std::max<int64_t>(1, (k + depths - 1) / depths), sums = depths > 1 ? 1 : 0;
    const int64_t of_row = depth + PADDING, of_column = depth;  // elements of a and of b
    room -= PADDING * depth;
    // rows of_row + columns of_column + sums rows columns = room
    const double both = static_cast<double>(of_row + of_column);
    const int64_t side =
        sums ? static_cast<int64_t>((std::sqrt(both * both + 4.0 * static_cast<double>(room)) - both) / 2)
             : room / (of_row + of_column);
    rows = std::min(m, side);
    columns = whole_panels((room - rows * of_row) / (of_column + sums * rows));
    if (columns >= n) {
      columns = (n + panel - 1) / panel * panel;
      rows = std::min(m, (room - columns * of_column) / (of_row + sums * columns));
    }
  }

 private:
  int64_t whole_panels(int64_t n) const { return std::max<int64_t>(1, n / panel) * panel; }
};

// finished(tile), a Finished, for all tiles of the [m, n] product of a [m, terms] and b [terms, n]:
//   a(rows, terms, to)            those of a as operands: made at `to`, in rows or columns of `padded` length, or where
//                                 they lie if `reads_a`
//   b(terms, columns, panel, to)  those of b, packed
template <class S, class E, class A, class B, class F>
void multiply_in_blocks(const Numbers<S, E>& numbers, int64_t m, int64_t n, int64_t terms, bool reads_a, A a, B b,
                        F finished) {
  if (m == 0 || n == 0) return;
  constexpr int64_t TERMS = Numbers<S, E>::TERMS;
  const int64_t k = operands<E>(terms);
  const Blocks blocks(numbers.tile(), numbers.kc(), m, n, k, reads_a);
  const int64_t panel = blocks.panel, row_blocks = (m + blocks.rows - 1) / blocks.rows;
  const int64_t column_blocks = (n + blocks.columns - 1) / blocks.columns;
  const int64_t most = (k + blocks.depths - 1) / blocks.depths, rows = (m + row_blocks - 1) / row_blocks;
  Arena arena(thread_memory(), THREAD_MEMORY);
  E* const packed = arena.take<E>(most * blocks.columns);
  const int64_t of_a = std::max(rows * padded(most, sizeof(E)), padded(rows, sizeof(E)) * most);
  E* const made = arena.take<E>(reads_a ? 0 : of_a);
  const int64_t ld_sums = blocks.columns;
  float* const sums = arena.take<float>(blocks.depths > 1 ? rows * ld_sums : 0);
  for (int64_t j = 0; j < column_blocks; ++j) {
    const Range columns = part(n, panel, j, column_blocks);
    for (int64_t i = 0; i < row_blocks; ++i) {
      const Range some = part(m, 1, i, row_blocks);
      for (int64_t q = 0; q < blocks.depths; ++q) {
        const Range depth = part(terms, TERMS, q, blocks.depths);
        if (i == 0 || blocks.depths > 1) b(depth, columns, panel, packed);
        Gemm<E> g{};
        g.m = some.size();
        g.n = columns.size();
        g.k = operands<E>(depth.size());
        g.a = a(some, depth, made);
        g.b = packed;
        g.panel = panel;
        g.ldb = g.k * panel;
        g.init = q ? sums : nullptr;
        g.ld_init = ld_sums;
        if (q + 1 < blocks.depths) {
          g.c = sums;
          g.ldc = ld_sums;
          numbers.products.gemm(g);
        } else {
          numbers.multiply(g, [&](Finished tile) {
            tile.i += some.begin;
            tile.j += columns.begin;
            finished(tile);
          });
        }
      }
    }
  }
}

}  // namespace pyperc
