// How far apart torch's threads are, by a cache line that two of them write in turn.
#include "round_trip.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <vector>

namespace pyperc {

namespace {

using Clock = std::chrono::steady_clock;

struct alignas(128) Ball {
  std::atomic<int> turn{0};
};

// Waits until it is `turn`; false where it is late, as the other thread may not be running.
bool await(const Ball& ball, int turn, Clock::time_point late) {
  for (unsigned spins = 1; ball.turn.load(std::memory_order_acquire) != turn; ++spins) {
    if (spins % 256 == 0 && Clock::now() > late) return false;
  }
  return true;
}

}  // namespace

double round_trip() {
  constexpr int BURSTS = 6, ROUNDS = 20;
  const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (threads < 2) return 0;
  std::vector<Ball> balls(static_cast<size_t>(threads));
  double farthest = 0;
  const auto late = Clock::now() + std::chrono::milliseconds(2);
  const auto first = [&](Ball& ball) {
    double least = std::numeric_limits<double>::infinity();
    for (int burst = 0; burst < BURSTS; ++burst) {
      const auto start = Clock::now();
      for (int i = burst * ROUNDS; i < (burst + 1) * ROUNDS; ++i) {
        ball.turn.store(2 * i + 1, std::memory_order_release);
        if (!await(ball, 2 * i + 2, late)) return 0.0;
      }
      least = std::min(least, std::chrono::duration<double, std::nano>(Clock::now() - start).count() / ROUNDS);
    }
    return least;
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    if (end - begin > 1) return;  // one thread plays several parts
    if (begin == 0) {
      for (int other = 1; other < threads; ++other) {
        farthest = std::max(farthest, first(balls[static_cast<size_t>(other)]));
      }
      return;
    }
    Ball& ball = balls[static_cast<size_t>(begin)];
    for (int i = 0; i < BURSTS * ROUNDS; ++i) {
      if (!await(ball, 2 * i + 1, late)) return;
      ball.turn.store(2 * i + 2, std::memory_order_release);
    }
  });
  return farthest;
}

}  // namespace pyperc
