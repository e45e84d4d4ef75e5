// For quantizers that search a scale: how well the nearest codes at given scales fit the weights.
#include "dispatch.h"
#include "lowbit.h"
#include "parallel.h"

namespace lowbit {

void fit_scales(const float* x, const float* mask, int64_t units, int64_t masks, int64_t length,
                const float* scale, Format format, int low, int high, float* out, int threads) {
  const Kernel& kernel = lowbit::kernel();
  const FormatTraits& f = traits(format);
  constexpr int64_t kCostOfCode = 8;  // in multiply-accumulates of a kernel, about
  parallel(worthwhile_threads(threads, units * length * kCostOfCode), [&](int thread, int team) {
    const Range mine = part(units, thread, team);
    for (int64_t u = mine.begin; u < mine.end; ++u)
      kernel.fit(x + u * length, mask + u % masks * length, length, scale[u],
                 static_cast<float>(low), static_cast<float>(high), static_cast<float>(f.mul),
                 static_cast<float>(f.add), out + 3 * u);
  });
}

}  // namespace lowbit
