// AVX-VNNI: Alder Lake, Zen 5 and later; the instructions of AVX-512-VNNI on 16 registers of half
// the size.
#define LOWBIT_KERNEL_NAME avxvnni
#if !defined(__AVXVNNI__) || !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_CARRY_SAVE
#include "avx2.inl"

// 12 accumulators + 2 weights + 1 activation
constexpr int kMr = 6, kPanels = 1, kTallMr = kMr, kTallPanels = 1;
constexpr int kChainSums = 12, kTightSums = 10;
constexpr bool kMaskInPlace = true;

// Assembly, as on AVX-512: where GCC 12 sees the intrinsic it copies accumulators.
template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(a));
  return acc;
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
