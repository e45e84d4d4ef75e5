// AVX-512-VNNI with VPOPCNTDQ: Ice Lake, Zen 4 and later.
#define LOWBIT_KERNEL_NAME avx512vpopcnt
#if !defined(__AVX512VNNI__) || !defined(__AVX512VPOPCNTDQ__) || !defined(__AVX512BW__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#include "avx512.inl"

inline Reg popcount_add(Reg acc, Reg v) {
  accumulate(acc, _mm512_popcnt_epi32(v));
  return acc;
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
