// Portable C++: the fallback, and what the other ISAs are measured against. 16 lanes, so that the
// compiler can use whatever vectors the baseline has.
#define LOWBIT_KERNEL_NAME scalar
#include "begin.inl"

struct Reg {
  uint32_t lane[16];
};
constexpr int kGroupSums = 0;
constexpr int kRegs = 1, kMr = 4, kPanels = 1, kTallMr = kMr, kTallPanels = 1, kChainSums = 1,
              kTightSums = 0;
constexpr bool kMaskInPlace = false;

inline Reg zero() { return Reg{}; }
inline Reg load(const uint8_t* p) {
  Reg v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
inline void store(int32_t* p, const Reg& v) { __builtin_memcpy(p, &v, 64); }
inline Reg splat(uint32_t x) {
  Reg v;
  for (uint32_t& lane : v.lane) lane = x;
  return v;
}
inline Reg bytes(int x) { return splat(0x01010101u * static_cast<uint32_t>(x)); }
inline Reg broadcast(const int8_t* p) {
  uint32_t x;
  __builtin_memcpy(&x, p, 4);
  return splat(x);
}
inline void opaque(Reg& v) { asm volatile("" : "+m"(v)); }
struct FloatReg {
  float lane[16];
};
inline FloatReg float_splat(float x) {
  FloatReg v;
  for (float& lane : v.lane) lane = x;
  return v;
}
inline FloatReg float_broadcast(const float* p) { return float_splat(*p); }
inline FloatReg float_load(const float* p) {
  FloatReg v;
  __builtin_memcpy(&v, p, 64);
  return v;
}
// float16 to float32, exactly, infinities and NaN included; float16's subnormals by way of
// integers, so that flushing those of float32 changes nothing. Long: not inlined into every tile.
__attribute__((noinline)) FloatReg half_load(const uint16_t* p) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = static_cast<uint32_t>(p[i] & 0x7fff) << 13;
    const uint32_t sign = static_cast<uint32_t>(p[i] & 0x8000) << 16;
    const uint32_t offset = magnitude >= 0x0f800000u ? 0x70000000u : 0x38000000u;
    const float small = static_cast<float>(p[i] & 0x3ff) * 0x1p-24f;
    uint32_t bits;
    __builtin_memcpy(&bits, &small, 4);
    bits = sign | (magnitude < 0x00800000u ? bits : magnitude + offset);
    __builtin_memcpy(&out.lane[i], &bits, 4);
  }
  return out;
}
inline void float_store(float* p, const FloatReg& v) { __builtin_memcpy(p, &v, 64); }
inline FloatReg to_float(const Reg& v) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<float>(static_cast<int32_t>(v.lane[i]));
  return out;
}
inline FloatReg multiply(const FloatReg& a, const FloatReg& b) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] * b.lane[i];
  return out;
}
inline FloatReg fmadd(const FloatReg& a, const FloatReg& b, const FloatReg& c) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]);
  return out;
}
inline FloatReg float_add(const FloatReg& a, const FloatReg& b) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] + b.lane[i];
  return out;
}
inline FloatReg float_max(const FloatReg& a, const FloatReg& b) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i];
  return out;
}
inline FloatReg float_min(const FloatReg& a, const FloatReg& b) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i];
  return out;
}
inline FloatReg float_quads(const float* p, ptrdiff_t stride) {
  FloatReg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = p[i / 4 * stride + i % 4];
  return v;
}
// Of each quarter: lane a[From], b[From], then the next of both; pairs of lanes likewise.
template <int From, int Size>
inline FloatReg deal(const FloatReg& a, const FloatReg& b) {
  FloatReg v;
  for (int i = 0; i < 16; ++i)
    v.lane[i] =
        (i / Size % 2 ? b : a).lane[i / 4 * 4 + From + i % 4 / (2 * Size) * Size + i % Size];
  return v;
}
inline FloatReg zip_low(const FloatReg& a, const FloatReg& b) { return deal<0, 1>(a, b); }
inline FloatReg zip_high(const FloatReg& a, const FloatReg& b) { return deal<2, 1>(a, b); }
inline FloatReg pair_low(const FloatReg& a, const FloatReg& b) { return deal<0, 2>(a, b); }
inline FloatReg pair_high(const FloatReg& a, const FloatReg& b) { return deal<2, 2>(a, b); }
inline FloatReg magnitude(const FloatReg& v) {
  FloatReg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = __builtin_fabsf(v.lane[i]);
  return out;
}
inline uint32_t negative(const FloatReg& v) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= v.lane[i] >= 0.0f ? 0u : 1u << i;
  return bits;
}
// Of |v| < 2^22, by adding 1.5 * 2^23.
inline Reg nearest(const FloatReg& v) {
  Reg out;
  for (int i = 0; i < 16; ++i) {
    const float x = v.lane[i] + 12582912.0f;
    __builtin_memcpy(&out.lane[i], &x, 4);
    out.lane[i] -= 0x4B400000u;
  }
  return out;
}
inline void store_codes(int8_t* p, const Reg& v) {
  for (int i = 0; i < 16; ++i) {
    const auto x = static_cast<int32_t>(v.lane[i]);
    p[i] = static_cast<int8_t>(x < -128 ? -128 : x > 127 ? 127 : x);
  }
}
inline Reg load_codes(const int8_t* p) {
  Reg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = static_cast<uint32_t>(static_cast<int32_t>(p[i]));
  return v;
}
inline void opaque_float(FloatReg& v) { asm volatile("" : "+m"(v)); }

template <int B, int P, int S, bool>
inline Reg unpack(const Reg& v) {
  constexpr uint32_t kMask = ((1u << B) - 1) * 0x01010101u;
  Reg u;
  for (int i = 0; i < 16; ++i) u.lane[i] = (v.lane[i] >> (B * P) & kMask) << S;
  return u;
}

template <int B>
inline Reg dot(const Reg& acc, const Reg& u, const Reg& a) {
  Reg out;
  for (int i = 0; i < 16; ++i) {
    int32_t s = 0;
    for (int j = 0; j < 4; ++j)
      s += static_cast<int32_t>(u.lane[i] >> (8 * j) & 0xff) *
           static_cast<int8_t>(a.lane[i] >> (8 * j) & 0xff);
    out.lane[i] = acc.lane[i] + static_cast<uint32_t>(s);
  }
  return out;
}

inline Reg add(const Reg& a, const Reg& b) {
  Reg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] + b.lane[i];
  return v;
}
template <int N>
inline Reg shift_left(const Reg& v) {
  Reg out;
  for (int i = 0; i < 16; ++i) out.lane[i] = v.lane[i] << N;
  return out;
}
template <int N>
inline Reg shift_right(const Reg& v) {
  Reg out;
  for (int i = 0; i < 16; ++i)
    out.lane[i] = static_cast<uint32_t>(static_cast<int32_t>(v.lane[i]) >> N);
  return out;
}
inline Reg sub(const Reg& a, const Reg& b) {
  Reg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] - b.lane[i];
  return v;
}
inline Reg bit_xor(const Reg& a, const Reg& b) {
  Reg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] ^ b.lane[i];
  return v;
}
inline Reg bit_and(const Reg& a, const Reg& b) {
  Reg v;
  for (int i = 0; i < 16; ++i) v.lane[i] = a.lane[i] & b.lane[i];
  return v;
}
inline Reg popcount_add(const Reg& acc, const Reg& v) {
  Reg out;
  for (int i = 0; i < 16; ++i) {
    uint32_t x = v.lane[i];
    x -= x >> 1 & 0x55555555u;
    x = (x & 0x33333333u) + (x >> 2 & 0x33333333u);
    x = (x + (x >> 4)) & 0x0f0f0f0fu;
    out.lane[i] = acc.lane[i] + (x * 0x01010101u >> 24);
  }
  return out;
}

inline void interleave(const int8_t* t0, const int8_t* t1, const int8_t* t2, const int8_t* t3,
                       Reg (&out)[1]) {
  for (int i = 0; i < 16; ++i)
    out[0].lane[i] = static_cast<uint32_t>(static_cast<uint8_t>(t0[i])) |
                     static_cast<uint32_t>(static_cast<uint8_t>(t1[i])) << 8 |
                     static_cast<uint32_t>(static_cast<uint8_t>(t2[i])) << 16 |
                     static_cast<uint32_t>(static_cast<uint8_t>(t3[i])) << 24;
}

inline Reg load16(const int8_t* p) {
  Reg v;
  for (int i = 0; i < 4; ++i) __builtin_memcpy(v.lane + 4 * i, p, 16);
  return v;
}
inline Reg shuffle(const Reg& v, const Reg& control) {
  uint8_t from[64], by[64], to[64];
  __builtin_memcpy(from, &v, 64);
  __builtin_memcpy(by, &control, 64);
  for (int i = 0; i < 64; ++i) to[i] = by[i] > 127 ? uint8_t{0} : from[i / 16 * 16 + by[i] % 16];
  Reg out;
  __builtin_memcpy(&out, to, 64);
  return out;
}

#include "microkernel.inl"
#include "rows.inl"
#include "table.inl"
