// The ceilings that a figure is a fraction of.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "dispatch.h"
#include "lowbit.h"
#include "parallel.h"
#include "scratch.h"

namespace lowbit {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The best rate of short rounds within a budget: a ceiling is what the machine can do undisturbed.
template <class Round>
double best_rate(double seconds, Round round) {
  if (!(seconds > 0)) throw std::invalid_argument("a probe needs more than 0 seconds");
  double best = 0;
  const double end = now() + seconds;
  do {
    const double start = now(), work = round(), elapsed = now() - start;
    if (elapsed > 0) best = std::max(best, work / elapsed);
  } while (now() < end);
  return best;
}

}  // namespace

double probe(const std::string& what, double seconds) {
  const Kernel& k = kernel();
  double (*const run)(int64_t) = what == "dot" || what == "dot1" ? k.probe_dot[3]
                                 : what == "dot2"                ? k.probe_dot[2]
                                 : what == "dot4"                ? k.probe_dot[1]
                                 : what == "dot8"                ? k.probe_dot[0]
                                 : what == "fma"                 ? k.probe_fma
                                 : what == "xnor"                ? k.probe_xnor
                                                                 : nullptr;
  if (!run)
    throw std::invalid_argument("probe '" + what +
                                "' is unknown; use dot, dot8, dot4, dot2, dot1, fma or xnor");
  constexpr int64_t kIterations = 200000;
  return best_rate(seconds, [&] { return run(kIterations); });
}

double read_bandwidth(int64_t bytes, int threads, double seconds) {
  if (bytes < 4096 || threads < 1)
    throw std::invalid_argument("read_bandwidth: bytes >= 4096, threads >= 1");
  const Kernel& k = kernel();
  Scratch scratch;
  char* block;
  scratch.cut(piece(block, bytes));
  std::memset(block, 1, static_cast<size_t>(bytes));
  move_to_huge_pages(block, static_cast<size_t>(bytes));  // as weights are
  std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
  const int repeat = static_cast<int>(std::max<int64_t>(1, (int64_t{64} << 20) / bytes));
  volatile uint64_t sink = 0;
  const double rate = best_rate(seconds, [&] {
    parallel(threads, [&](int thread, int team) {
      const Range mine = part(bytes / 4096, thread, team);
      for (int i = 0; i < repeat; ++i)
        sums[static_cast<size_t>(thread) * 8] +=
            k.read(block + mine.begin * 4096, (mine.end - mine.begin) * 4096);
    });
    for (uint64_t s : sums) sink = sink + s;
    return static_cast<double>(bytes / 4096 * 4096) * repeat;
  });
  return rate;
}

}  // namespace lowbit
