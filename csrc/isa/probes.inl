// The ceilings: the kernels' own instruction mix on registers alone.
constexpr int kChains = 12;

double probe_dot(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = bytes(1);
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = dot<4>(acc[i], u, a);
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes;
}

double probe_xnor(int64_t iterations) {
  Reg acc[kChains], u = bytes(1), a = zero();
  opaque(u), opaque(a);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = zero();
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      opaque(u);
      acc[i] = popcount_add(acc[i], bit_xor(u, a));
      opaque(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * kRegBytes * 8;
}

double probe_fma(int64_t iterations) {
  FloatReg acc[kChains], a = float_splat(1.0f), b = float_splat(1.0f);
  opaque_float(a), opaque_float(b);
  LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) acc[i] = float_splat(1.0f);
  for (int64_t n = 0; n < iterations; ++n) LOWBIT_UNROLL for (int i = 0; i < kChains; ++i) {
      acc[i] = fmadd(a, b, acc[i]);
      opaque_float(acc[i]);
    }
  return static_cast<double>(iterations) * kChains * (kRegBytes / 4);
}
