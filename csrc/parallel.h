// Threads: the OpenMP pool that torch uses too. The caller says how many; small work stays on one.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace lowbit {

// A thread is worth waking (some microseconds) for this many multiply-accumulates.
inline constexpr int64_t kMacsPerThread = int64_t{1} << 20;

inline int worthwhile_threads(int threads, int64_t macs) {
  return static_cast<int>(std::clamp<int64_t>(macs / kMacsPerThread, 1, std::max(threads, 1)));
}

// body(thread, threads) on each thread of a team. It may contain team_barrier(), and throw after
// its last one (before it, the others would wait for ever): one of the team's exceptions is
// rethrown.
template <class Body>
void parallel(int threads, Body body) {
  if (threads <= 1) return body(0, 1);
  std::exception_ptr error;
#pragma omp parallel num_threads(threads)
  try {
    body(omp_get_thread_num(), omp_get_num_threads());
  } catch (...) {
#pragma omp critical(lowbit_error)
    error = std::current_exception();
  }
  if (error) std::rethrow_exception(error);
}

inline void team_barrier(int threads) {
  if (threads > 1) {
#pragma omp barrier
  }
}

struct Range {
  int64_t begin, end;
};

// Part `i` of `parts` of [0, count), sizes differing by one at most.
inline Range part(int64_t count, int64_t i, int64_t parts) {
  return {count * i / parts, count * (i + 1) / parts};
}

}  // namespace lowbit
