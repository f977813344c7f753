// The kernels of the three products and their launcher, for the one dtype that each gemm_*.cu names: on the matrix
// instructions in 16 bits and TF32, on the ordinary cores in float32 and float64.
#pragma once

#include <algorithm>

#include "epilogue.cuh"
#include "launch.cuh"
#include "operand.cuh"
#include "sum_rows.cuh"

namespace pyperc::cuda {

template <Epilogue E>
constexpr bool A_ALONG_K = E != Epilogue::Nothing;
template <Epilogue E>
constexpr bool B_ALONG_K = E == Epilogue::Activate;

// A block of BM x BN sums by WARPS_M x WARPS_N warps; k goes by in steps of 64 bytes through STAGES tiles.
template <int BM_, int BN_, int WARPS_M_, int WARPS_N_>
struct MatrixShape {
  static constexpr int BM = BM_, BN = BN_, WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, STAGES = 4;
  static constexpr int THREADS = WARPS_M * WARPS_N * WARP, WM = BM / WARPS_M, WN = BN / WARPS_N;
  template <class T>
  static constexpr int BK = 64 / sizeof(T);
  template <class T>
  static constexpr size_t SHARED = std::max<size_t>(STAGES * (BM + BN) * 64, BM * BN * sizeof(float));
};
using LargeMatrix = MatrixShape<128, 128, 2, 4>;
using SmallMatrix = MatrixShape<64, 64, 2, 2>;
// How many fit on a multiprocessor: with 128 registers a thread, or where TF32 is rounded on its way, with 255.
template <class T, class S>
constexpr int MATRIX_BLOCKS = (sizeof(T) == 2 ? 512 : 256) / S::THREADS;

template <class T, class S, Epilogue E>
PYPERC_KERNEL(S::THREADS, (MATRIX_BLOCKS<T, S>))
matrix_gemm_kernel(PYPERC_PARAMETER Gemm<T> g, PYPERC_PARAMETER Blocks p) {
  constexpr int BK = S::template BK<T>;
  using TileA = OperandTile<T, S::BM, BK, A_ALONG_K<E>>;
  using TileB = OperandTile<T, S::BN, BK, B_ALONG_K<E>>;
  auto* memory = reinterpret_cast<T*>(shared_memory());
  const auto tile_a = [&](int step) { return TileA(memory + step % S::STAGES * (TileA::SIZE + TileB::SIZE)); };
  const auto tile_b = [&](int step) { return TileB(tile_a(step).data + TileA::SIZE); };

  const Place at(g, p, S::BM, S::BN, BK);
  const T* a = g.a.data + at.m * g.a.rs + at.k * g.a.cs;
  const T* b = g.b.data + at.n * g.b.cs + at.k * g.b.rs;
  const auto fetch = [&](int step) {
    if (step < at.steps) {
      const int k = step + 1 < at.steps ? BK : at.last;
      tile_a(step).template fetch<S::THREADS>(a, g.a.rs, g.a.cs, at.height, k, p.a_whole);
      tile_b(step).template fetch<S::THREADS>(b, g.b.cs, g.b.rs, at.width, k, p.b_whole);
      a += BK * g.a.cs;
      b += BK * g.b.rs;
    }
    copy_commit();  // an empty group where there is nothing left, so that the count of groups stays right
  };

  const int row = warp() / S::WARPS_N * S::WM, column = warp() % S::WARPS_N * S::WN;
  FragmentC c[S::WM / 16][S::WN / 8] = {};
  PYPERC_NO_UNROLL
  for (int step = 0; step < S::STAGES - 1; ++step) fetch(step);
  PYPERC_NO_UNROLL
  for (int step = 0; step < at.steps; ++step) {
    copy_wait<S::STAGES - 2>();
    sync();  // this step's tiles are there for all, and nobody reads those of the step before any more
    fetch(step + S::STAGES - 1);
    PYPERC_UNROLL
    for (int half = 0; half < 2; ++half) {
      FragmentB y[S::WN / 16][2];
      PYPERC_UNROLL
      for (int j = 0; j < S::WN / 16; ++j) tile_b(step).as_b(column + j * 16, half, y[j]);
      PYPERC_UNROLL
      for (int i = 0; i < S::WM / 16; ++i) {
        const FragmentA x = tile_a(step).as_a(row + i * 16, half);
        PYPERC_UNROLL
        for (int j = 0; j < S::WN / 8; ++j) mma<T>(c[i][j], x, y[j / 2][j % 2]);
      }
    }
  }
  copy_wait<0>();
  sync();  // the tiles have been read: their place is free

  using Result = Sums<T, S::BM, S::BN, S::THREADS>;
  const typename Result::Shared sums{reinterpret_cast<Wide<T>*>(shared_memory())};
  PYPERC_UNROLL
  for (int i = 0; i < S::WM / 16; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < S::WN / 8; ++j) {
      const int r = row + i * 16 + lane() / 4, n = column + j * 8 + lane() % 4 * 2;
      PYPERC_UNROLL
      for (int half = 0; half < 2; ++half) {
        Wide<T>* to = sums.element(r + half * 8, n);
        to[0] = c[i][j].r[half * 2];
        to[1] = c[i][j].r[half * 2 + 1];
      }
    }
  }
  sync();
  Result(sums, at.height, at.width).template finish<E>(g, at, p);
}

// 16 x 16 threads, each with TILE x TILE sums; a and b lie in shared memory along m and n.
template <class T>
struct OrdinaryShape {
  static constexpr int SIZE = Vector<T>::SIZE, TILE = sizeof(T) == 8 ? 4 : 8, BK = 16, THREADS = 256, BLOCKS = 2;
  static constexpr int BM = 16 * TILE, BN = BM, LD = BM + SIZE;
  static constexpr size_t SHARED = std::max<size_t>(4 * BK * LD, BM* BN) * sizeof(T);
};

// A thread's share of an operand's tile of ROWS x BK, on its way from global to shared memory. Neighbouring threads
// read neighbours in memory.
template <class T, bool ALONG_K>
struct Staged {
  using S = OrdinaryShape<T>;
  static constexpr int COUNT = S::BM * S::BK / S::THREADS;
  T v[COUNT];

  static constexpr int ACROSS = ALONG_K ? S::BK : S::BM, APART = S::THREADS / ACROSS;

  // The first row and step along k of the thread; the next lies APART further on.
  static PYPERC_DEVICE int row() { return ALONG_K ? thread() / ACROSS : thread() % ACROSS; }
  static PYPERC_DEVICE int step() { return ALONG_K ? thread() % ACROSS : thread() / ACROSS; }

  PYPERC_DEVICE void fetch(const T* from, int64_t rs, int64_t ks, int rows, int k) {
    from += row() * rs + step() * ks;
    const int left = ALONG_K ? (step() < k ? rows - row() : 0) : (row() < rows ? k - step() : 0);
    PYPERC_UNROLL
    for (int i = 0; i < COUNT; ++i) v[i] = i * APART < left ? from[i * (APART * (ALONG_K ? rs : ks))] : T(0);
  }
  PYPERC_DEVICE void put(T* shared) const {
    shared += step() * S::LD + row();
    PYPERC_UNROLL
    for (int i = 0; i < COUNT; ++i) shared[i * APART * (ALONG_K ? 1 : S::LD)] = v[i];
  }
};

template <class T, Epilogue E>
PYPERC_KERNEL(OrdinaryShape<T>::THREADS, OrdinaryShape<T>::BLOCKS)
ordinary_gemm_kernel(PYPERC_PARAMETER Gemm<T> g, PYPERC_PARAMETER Blocks p) {
  using S = OrdinaryShape<T>;
  constexpr int SIZE = S::SIZE, GROUPS = S::TILE / SIZE;
  auto* memory = reinterpret_cast<T*>(shared_memory());
  const auto buffer_a = [&](int step) { return memory + step % 2 * (2 * S::BK * S::LD); };
  const auto buffer_b = [&](int step) { return buffer_a(step) + S::BK * S::LD; };

  const Place at(g, p, S::BM, S::BN, S::BK);
  const T* from_a = g.a.data + at.m * g.a.rs + at.k * g.a.cs;
  const T* from_b = g.b.data + at.n * g.b.cs + at.k * g.b.rs;
  Staged<T, A_ALONG_K<E>> a;
  Staged<T, B_ALONG_K<E>> b;
  const auto fetch = [&](int step) {
    const int k = step + 1 < at.steps ? S::BK : at.last;
    a.fetch(from_a, g.a.rs, g.a.cs, at.height, k);
    b.fetch(from_b, g.b.cs, g.b.rs, at.width, k);
    from_a += S::BK * g.a.cs;
    from_b += S::BK * g.b.rs;
  };
  const auto put = [&](int step) {
    a.put(buffer_a(step));
    b.put(buffer_b(step));
  };

  const int row = thread() / 16 * SIZE, column = thread() % 16 * SIZE;
  T c[S::TILE][S::TILE] = {};
  if (at.steps) {
    fetch(0);
    put(0);
  }
  sync();
  PYPERC_NO_UNROLL
  for (int step = 0; step < at.steps; ++step) {
    if (step + 1 < at.steps) fetch(step + 1);
    PYPERC_UNROLL
    for (int k = 0; k < S::BK; ++k) {
      Vector<T> x[GROUPS], y[GROUPS];
      PYPERC_UNROLL
      for (int i = 0; i < GROUPS; ++i) {
        x[i] = load16(buffer_a(step) + k * S::LD + i * 16 * SIZE + row);
        y[i] = load16(buffer_b(step) + k * S::LD + i * 16 * SIZE + column);
      }
      PYPERC_UNROLL
      for (int i = 0; i < S::TILE; ++i) {
        PYPERC_UNROLL
        for (int j = 0; j < S::TILE; ++j) c[i][j] += x[i / SIZE].e[i % SIZE] * y[j / SIZE].e[j % SIZE];
      }
    }
    if (step + 1 < at.steps) put(step + 1);
    sync();
  }

  using Result = Sums<T, S::BM, S::BN, S::THREADS>;
  const typename Result::Shared sums{memory};
  PYPERC_UNROLL
  for (int i = 0; i < S::TILE; ++i) {
    PYPERC_UNROLL
    for (int j = 0; j < GROUPS; ++j) {
      Vector<T> v;
      PYPERC_UNROLL
      for (int e = 0; e < SIZE; ++e) v.e[e] = c[i][j * SIZE + e];
      store16(sums.at(i / SIZE * 16 * SIZE + row + i % SIZE, (j * 16 * SIZE + column) / SIZE), v);
    }
  }
  sync();
  Result(sums, at.height, at.width).template finish<E>(g, at, p);
}

// How a product is cut: the table of its thresholds.
//
// FILLED        blocks that keep every multiprocessor of a large GPU busy
// LEAST_K       terms of a sum that are worth a block and a pass over its partial sums
// MOST_SPLITS   partial sums, beyond which adding them up takes as long as making them
struct GemmPlan {
  static constexpr int64_t FILLED = 128, LEAST_K = 512, MOST_SPLITS = 64;
  bool matrix, large;
  int64_t bm, bn, splits, k;
};

template <class T>
GemmPlan plan_gemm(const Gemm<T>& g) {
  GemmPlan plan{};
  plan.matrix = sizeof(T) == 2 || (sizeof(T) == 4 && g.tf32);
  const bool sums = g.epilogue == Epilogue::Nothing;
  const int64_t large = divide_up(g.m, LargeMatrix::BM) * divide_up(g.n, LargeMatrix::BN);
  plan.large = large >= GemmPlan::FILLED || (sums && g.m > SmallMatrix::BM && g.n > SmallMatrix::BN);
  plan.bm = plan.bn = !plan.matrix ? OrdinaryShape<T>::BM : plan.large ? LargeMatrix::BM : SmallMatrix::BM;
  const int64_t tiles = divide_up(g.m, plan.bm) * divide_up(g.n, plan.bn);
  const int64_t most = std::min(GemmPlan::MOST_SPLITS, g.k / GemmPlan::LEAST_K);
  const int64_t wanted = sums ? std::max<int64_t>(1, std::min(most, 2 * GemmPlan::FILLED / tiles)) : 1;
  constexpr int64_t STEP = 64;  // a whole number of steps, of any kernel
  plan.k = divide_up(divide_up(std::max<int64_t>(1, g.k), wanted), STEP) * STEP;
  plan.splits = divide_up(std::max<int64_t>(1, g.k), plan.k);
  return plan;
}

template <class T>
size_t gemm_workspace(const Gemm<T>& g) {
  if (g.m == 0 || g.n == 0) return 0;
  const GemmPlan plan = plan_gemm(g);
  int64_t rows = plan.splits > 1 ? plan.splits * g.m : 0;
  if (g.epilogue == Epilogue::Differentiate && g.db) rows = divide_up(g.m, plan.bm);
  return static_cast<size_t>(rows * g.n) * sizeof(Wide<T>);
}

template <class T, Epilogue E>
Status launch_gemm(const Gemm<T>& g, Stream stream) {
  const GemmPlan plan = plan_gemm(g);
  const auto aligned = [](const void* data, int64_t ld) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  };
  const auto whole = [&](const T* data, int64_t along, int64_t across) { return along == 1 && aligned(data, across); };
  Blocks p{};
  p.tiles_m = static_cast<uint32_t>(divide_up(g.m, plan.bm));
  p.tiles_n = static_cast<uint32_t>(divide_up(g.n, plan.bn));
  p.splits = static_cast<uint32_t>(plan.splits);
  p.k = plan.k;
  p.a_whole = A_ALONG_K<E> ? whole(g.a.data, g.a.cs, g.a.rs) : whole(g.a.data, g.a.rs, g.a.cs);
  p.b_whole = B_ALONG_K<E> ? whole(g.b.data, g.b.rs, g.b.cs) : whole(g.b.data, g.b.cs, g.b.rs);
  p.aligned = aligned(g.c, g.ldc) && aligned(g.s, g.ld_s) && aligned(g.saved, g.ld_saved);
  p.partial16 = g.n * sizeof(Wide<T>) % 16 == 0;
  const int64_t blocks = divide_up(g.m, plan.bm) * divide_up(g.n, plan.bn) * plan.splits;

  Status status = SUCCESS;
  if constexpr (sizeof(T) <= 4) {
    if (plan.matrix && plan.large) {
      status = launch(matrix_gemm_kernel<T, LargeMatrix, E>,
                      {blocks, LargeMatrix::THREADS, LargeMatrix::template SHARED<T>}, stream, g, p);
    } else if (plan.matrix) {
      status = launch(matrix_gemm_kernel<T, SmallMatrix, E>,
                      {blocks, SmallMatrix::THREADS, SmallMatrix::template SHARED<T>}, stream, g, p);
    }
  }
  if constexpr (sizeof(T) >= 4) {
    if (!plan.matrix) {
      using S = OrdinaryShape<T>;
      status = launch(ordinary_gemm_kernel<T, E>, {blocks, S::THREADS, S::SHARED}, stream, g, p);
    }
  }
  if (status != SUCCESS) return status;
  const auto* partial = static_cast<const Wide<T>*>(g.workspace);
  if (plan.splits > 1) return sum_splits(partial, plan.splits, g.m, g.n, g.c, g.ldc, stream);
  if (E == Epilogue::Differentiate && g.db) return sum_rows(partial, p.tiles_m, g.n, g.db, stream);
  return SUCCESS;
}

template <class T>
Status gemm(const Gemm<T>& g, Stream stream) {
  if (g.n == 0) return SUCCESS;
  if (g.m == 0) return g.db ? sum_rows(static_cast<const Wide<T>*>(nullptr), 0, g.n, g.db, stream) : SUCCESS;
  switch (g.epilogue) {
    case Epilogue::Nothing: return launch_gemm<T, Epilogue::Nothing>(g, stream);
    case Epilogue::Activate: return launch_gemm<T, Epilogue::Activate>(g, stream);
    case Epilogue::Differentiate: return launch_gemm<T, Epilogue::Differentiate>(g, stream);
  }
  return SUCCESS;
}

#define PYPERC_GEMM(T)                               \
  template size_t gemm_workspace<T>(const Gemm<T>&); \
  template Status gemm<T>(const Gemm<T>&, Stream);

}  // namespace pyperc::cuda
