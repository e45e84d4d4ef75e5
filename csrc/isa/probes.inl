// The ceilings: the kernels' own instruction mix on registers alone.
constexpr int kChains = 12;

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
