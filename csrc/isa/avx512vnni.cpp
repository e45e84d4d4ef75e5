// AVX-512-VNNI without VPOPCNTDQ (Cascade Lake): bits are counted by table.
#define LOWBIT_KERNEL_NAME avx512vnni
#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#include "avx512.inl"

inline Reg popcount_add(Reg acc, Reg v) {
  const Reg table =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const Reg low = _mm512_set1_epi8(0x0f);
  const Reg count =
      _mm512_add_epi8(_mm512_shuffle_epi8(table, _mm512_and_si512(v, low)),
                      _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(v, 4), low)));
  return _mm512_dpbusd_epi32(acc, count, bytes(1));
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
