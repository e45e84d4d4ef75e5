// xnor where an instruction counts bits. Part of microkernel.inl, after dot.inl. The vocabulary
// that it asks for:
//
//   popcount_add(acc, v)    acc[lane] += bits set in the lane

template <bool Masked>
struct Xnor {
  static constexpr int kFields = 1;

  template <int MR, int NP>
  static void panels(const Tile& t, int panel) {
    constexpr int V = NP * kRegs;
    sum_groups<MR, V>(t, panel, [&](int64_t first, int64_t steps, Reg(&out)[MR][V]) {
      const uint32_t *bits = t.bits, *mask = t.mask;
      const Panels<NP> panels(t, panel);
      const ptrdiff_t pitch = t.pitch;
      Reg count[MR][V];
      clear(count);
      for (int64_t s = first; s < first + steps; ++s) {
        Reg x[V];
        panels.load_step(s, x);
        LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
          const Reg a = broadcast(reinterpret_cast<const int8_t*>(bits + r * pitch + s));
          LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
            Reg d = bit_xor(x[v], a);
            if constexpr (Masked)
              d = bit_and(d, broadcast(reinterpret_cast<const int8_t*>(mask + r * pitch + s)));
            count[r][v] = popcount_add(count[r][v], d);
          }
        }
      }
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          out[r][v] = add(out[r][v], shift_left<1>(count[r][v]));
    });
  }
};

void xnor_any(const Tile& t) { return t.mask ? run_tile<Xnor<true>>(t) : run_tile<Xnor<false>>(t); }

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
