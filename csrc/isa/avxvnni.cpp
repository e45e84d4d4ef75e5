// AVX-VNNI: Alder Lake, Zen 5 and later; the instructions of AVX-512-VNNI on 16 registers of half
// the size.
#define LOWBIT_KERNEL_NAME avxvnni
#if !defined(__AVXVNNI__) || !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile this file with the flags of its row in isas.inc"
#endif
#define LOWBIT_CARRY_SAVE
#include "avx2.inl"

// 12 accumulators + 2 weights + 1 activation
constexpr int kGroupSums = 2;
constexpr int kMr = 6, kPanels = 1, kTallMr = kMr, kTallPanels = 1;
constexpr int kChainSums = 12, kTightSums = 10;
constexpr bool kMaskInPlace = true;

// Assembly, as on AVX-512: where GCC 12 sees the intrinsic it copies accumulators.
template <int B>
inline Reg dot(Reg acc, Reg u, Reg a) {
  asm volatile("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(u), "x"(a));
  return acc;
}

// The dwords that a half's windows lie in, then their bytes.
#define LOWBIT_WINDOWS
struct Windows {
  Reg dwords, places;

  explicit Windows(int stride) {
    const Reg lane = _mm256_setr_epi32(0, 1, 2, 3, 0, 1, 2, 3);
    dwords = _mm256_add_epi32(lane, _mm256_setr_epi32(0, 0, 0, 0, stride, stride, stride, stride));
    places = _mm256_add_epi32(_mm256_mullo_epi32(lane, _mm256_set1_epi32(stride * 0x01010101)),
                              _mm256_set1_epi32(0x03020100));
  }
  Reg operator()(Reg row) const {
    return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(row, dwords), places);
  }
};

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
