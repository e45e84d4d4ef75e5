// A team of threads: every one takes part, and an exception of any reaches the caller.
#include <doctest/doctest.h>

#include <new>
#include <stdexcept>
#include <vector>

#include "parallel.h"

using namespace lowbit;

TEST_CASE("every thread of a team runs the body once") {
  for (const int threads : {0, 1, 2, 5}) {
    std::vector<int> seen(8);
    int teams = 0;
    parallel(threads, [&](int thread, int team) {
      ++seen[static_cast<size_t>(thread)];
      team_barrier(team);
      if (thread == 0) teams = team;
    });
    CHECK(teams == std::max(threads, 1));
    for (size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == (i < static_cast<size_t>(teams)));
  }
}

TEST_CASE("an exception of any thread reaches the caller, after all have ended") {
  for (const int threads : {1, 2, 4})
    for (int throwing = 0; throwing < threads; ++throwing) {
      std::vector<int> ended(static_cast<size_t>(threads));
      CHECK_THROWS_AS(parallel(threads,
                               [&](int thread, int team) {
                                 team_barrier(team);
                                 if (thread == throwing) throw std::bad_alloc();
                                 ended[static_cast<size_t>(thread)] = 1;
                               }),
                      std::bad_alloc);
      for (int i = 0; i < threads; ++i) CHECK(ended[static_cast<size_t>(i)] == (i != throwing));
    }
}

TEST_CASE("an exception of every thread is one exception") {
  CHECK_THROWS_WITH_AS(parallel(3, [](int, int) { throw std::runtime_error("no"); }), "no",
                       std::runtime_error);
}

TEST_CASE("small work stays on one thread") {
  CHECK(worthwhile_threads(8, 0) == 1);
  CHECK(worthwhile_threads(8, kMacsPerThread) == 1);
  CHECK(worthwhile_threads(8, 3 * kMacsPerThread) == 3);
  CHECK(worthwhile_threads(2, 3 * kMacsPerThread) == 2);
  CHECK(worthwhile_threads(0, 3 * kMacsPerThread) == 1);
}
