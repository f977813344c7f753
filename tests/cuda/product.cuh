// A small product on the matrix instructions, C = A B^T: what the primitives and the tiles are tested with.
#pragma once

#include "../../csrc/cuda/launch.cuh"
#include "../../csrc/cuda/tile.cuh"

namespace pyperc::cuda {

template <class T>
struct SmallProduct {
  int64_t m, n, k;
  const T* a;  // [m, k]; its rows, like those of b, begin at multiples of 16 bytes
  int64_t lda;
  const T* b;  // [n, k]
  int64_t ldb;
  float* c;  // [m, n]
  int64_t ldc;
};

constexpr int PRODUCT_THREADS = 128, BM = 64, BN = 32, STAGES = 3;

// Four warps, each with 16 rows of the block's 64 x 32; k goes through three stages of copies.
template <class T>
PYPERC_KERNEL(PRODUCT_THREADS, 2)
small_product_kernel(PYPERC_PARAMETER SmallProduct<T> g) {
  constexpr int BK = 64 / sizeof(T);
  using TileA = Tile<T, BM, BK>;
  using TileB = Tile<T, BN, BK>;
  auto* memory = reinterpret_cast<T*>(shared_memory());
  const auto tile_a = [&](int64_t k) { return TileA{memory + k % STAGES * (TileA::SIZE + TileB::SIZE)}; };
  const auto tile_b = [&](int64_t k) { return TileB{tile_a(k).data + TileA::SIZE}; };
  const int64_t columns = divide_up(g.n, BN), m = block() / columns * BM, n = block() % columns * BN;
  const int64_t steps = divide_up(g.k, BK);
  const auto copy = [&](int64_t k) {
    if (k < steps) {
      tile_a(k).template copy<PRODUCT_THREADS>(g.a + m * g.lda + k * BK, g.lda, limited(g.m - m, BM),
                                               limited(g.k - k * BK, BK), thread());
      tile_b(k).template copy<PRODUCT_THREADS>(g.b + n * g.ldb + k * BK, g.ldb, limited(g.n - n, BN),
                                               limited(g.k - k * BK, BK), thread());
    }
    copy_commit();  // an empty group where there is nothing left, so that the count of groups stays right
  };
  for (int64_t k = 0; k < STAGES - 1; ++k) copy(k);
  FragmentC c[BN / 8] = {};
  for (int64_t k = 0; k < steps; ++k) {
    copy_wait<STAGES - 2>();
    sync();  // the tile of k is there for all, and nobody reads that of k - 1 any more
    copy(k + STAGES - 1);
    PYPERC_UNROLL
    for (int piece = 0; piece < TileA::PIECES; piece += 2) {
      const FragmentA a = tile_a(k).a(warp() * 16, piece);
      PYPERC_UNROLL
      for (int j = 0; j < BN; j += 16) {
        FragmentB b[2];
        tile_b(k).b(j, piece, b);
        mma<T>(c[j / 8], a, b[0]);
        mma<T>(c[j / 8 + 1], a, b[1]);
      }
    }
  }
  PYPERC_UNROLL
  for (int j = 0; j < BN / 8; ++j) {
    PYPERC_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int64_t row = m + warp() * 16 + lane() / 4 + r / 2 * 8, column = n + j * 8 + lane() % 4 * 2 + r % 2;
      if (row < g.m && column < g.n) g.c[row * g.ldc + column] = c[j].r[r];
    }
  }
}

template <class T>
Status small_product(const SmallProduct<T>& g, Stream stream) {
  constexpr size_t STAGE = (BM + BN) * 64;
  return launch(small_product_kernel<T>, {divide_up(g.m, BM) * divide_up(g.n, BN), PRODUCT_THREADS, STAGES * STAGE},
                stream, g);
}

}  // namespace pyperc::cuda
