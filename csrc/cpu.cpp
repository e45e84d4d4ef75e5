#include "cpu.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lowbit {
namespace {

uint32_t detect() {
  uint32_t f = 0;
#if defined(__x86_64__) || defined(__i386__)
  // The builtin also asks the operating system whether it saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) f |= kAvx2;
  if (__builtin_cpu_supports("fma")) f |= kFma;
  if (__builtin_cpu_supports("f16c")) f |= kF16c;
  if (__builtin_cpu_supports("avxvnni")) f |= kAvxVnni;
  if (__builtin_cpu_supports("avx512f")) f |= kAvx512F;
  if (__builtin_cpu_supports("avx512bw")) f |= kAvx512Bw;
  if (__builtin_cpu_supports("avx512vl")) f |= kAvx512Vl;
  if (__builtin_cpu_supports("avx512dq")) f |= kAvx512Dq;
  if (__builtin_cpu_supports("avx512vnni")) f |= kAvx512Vnni;
  if (__builtin_cpu_supports("avx512vpopcntdq")) f |= kAvx512Popcnt;
#elif defined(__aarch64__) && defined(__linux__)
  f |= kNeon;
  const unsigned long cap = getauxval(AT_HWCAP), cap2 = getauxval(AT_HWCAP2);
  if (cap & HWCAP_ASIMDDP) f |= kDotProd;
  if (cap2 & HWCAP2_I8MM) f |= kI8mm;
#elif defined(__aarch64__) && defined(__APPLE__)
  f |= kNeon;
  const auto has = [](const char* name) {
    int value = 0;
    size_t size = sizeof(value);
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  if (has("hw.optional.arm.FEAT_DotProd")) f |= kDotProd;
  if (has("hw.optional.arm.FEAT_I8MM")) f |= kI8mm;
#endif
  return f;
}

}  // namespace

uint32_t cpu_features() {
  static const uint32_t features = detect();
  return features;
}

std::string missing_baseline() {
#ifndef LOWBIT_BASELINE_FEATURES
#define LOWBIT_BASELINE_FEATURES 0u
#endif
  const uint32_t missing = LOWBIT_BASELINE_FEATURES & ~cpu_features();
  std::string names;
  for (int i = 0; i < kFeatureCount; ++i)
    if (missing >> i & 1) names += (names.empty() ? "" : ", ") + std::string(kFeatureNames[i]);
  return names;
}

}  // namespace lowbit
