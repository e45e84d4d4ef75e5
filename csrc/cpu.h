// What this CPU (and its operating system) can run, detected once.
#pragma once

#include <cstdint>
#include <string>

namespace lowbit {

#define LOWBIT_FEATURES(X)            \
  X(kAvx2, "avx2")                    \
  X(kFma, "fma")                      \
  X(kF16c, "f16c")                    \
  X(kAvxVnni, "avxvnni")              \
  X(kAvx512F, "avx512f")              \
  X(kAvx512Bw, "avx512bw")            \
  X(kAvx512Vl, "avx512vl")            \
  X(kAvx512Dq, "avx512dq")            \
  X(kAvx512Vnni, "avx512vnni")        \
  X(kAvx512Popcnt, "avx512vpopcntdq") \
  X(kNeon, "neon")                    \
  X(kDotProd, "dotprod")              \
  X(kI8mm, "i8mm")

enum FeatureIndex : int {
#define X(id, name) id##Index,
  LOWBIT_FEATURES(X)
#undef X
      kFeatureCount
};

#define X(id, name) inline constexpr uint32_t id = 1u << id##Index;
LOWBIT_FEATURES(X)
#undef X

inline constexpr const char* kFeatureNames[] = {
#define X(id, name) name,
    LOWBIT_FEATURES(X)
#undef X
};

uint32_t cpu_features();

// The features that the build took for granted (LOWBIT_CPU_BASELINE) and this CPU lacks, by name;
// empty: it may run.
std::string missing_baseline();

}  // namespace lowbit
