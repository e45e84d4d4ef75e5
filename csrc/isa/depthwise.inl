// Depthwise convolution on columns, over the vocabulary of microkernel.inl.

// N: the number of taps, so that their weights stay in registers over the pixels; 0: any number.
template <int B, int N>
void depthwise_panel(int pixels, const int8_t* columns, ptrdiff_t pixel_stride, int taps,
                     const ptrdiff_t* offsets, const uint8_t* w, ptrdiff_t w_stride,
                     const int8_t* zeros, int32_t* acc, int32_t* sums) {
  Reg codes[N ? N : 1][kRegs], zero_points[N ? N : 1];
  const auto weights_of = [&](int t, Reg(&c)[kRegs], Reg& z) {
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) c[r] = load(w + t * w_stride + r * kRegBytes);
    z = broadcast(zeros + 4 * t);
  };
  if constexpr (N > 0)
    LOWBIT_UNROLL for (int t = 0; t < N; ++t) weights_of(t, codes[t], zero_points[t]);
  for (int i = 0; i < pixels; ++i, columns += pixel_stride, acc += kNr) {
    Reg a[kRegs], s[kRegs];
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) a[r] = s[r] = zero();
    const auto add_tap = [&](int t, const Reg(&c)[kRegs], const Reg& z) {
      const uint8_t* column = reinterpret_cast<const uint8_t*>(columns + offsets[t]);
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) {
        const Reg x = load(column + r * kRegBytes);
        a[r] = dot<B>(a[r], c[r], x);
        s[r] = dot<B>(s[r], z, x);
      }
    };
    if constexpr (N > 0) {
      LOWBIT_UNROLL for (int t = 0; t < N; ++t) add_tap(t, codes[t], zero_points[t]);
    } else {
      for (int t = 0; t < taps; ++t) {
        weights_of(t, codes[0], zero_points[0]);
        add_tap(t, codes[0], zero_points[0]);
      }
    }
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(acc + r * (kRegBytes / 4), sub(a[r], s[r]));
    if (sums) {
      LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(sums + r * (kRegBytes / 4), s[r]);
      sums += kNr;
    }
  }
}

template <int B>
void depthwise_any(int pixels, const int8_t* columns, ptrdiff_t pixel_stride, int taps,
                   const ptrdiff_t* offsets, const uint8_t* w, ptrdiff_t w_stride,
                   const int8_t* zeros, int panels, int32_t* acc, int32_t* sums) {
  const auto run = taps == 3    ? depthwise_panel<B, 3>   // 3 x 3
                   : taps == 10 ? depthwise_panel<B, 10>  // 5 x 5
                                : depthwise_panel<B, 0>;
  for (int p = 0; p < panels; ++p)
    run(pixels, columns + p * kVectorBytes, pixel_stride, taps, offsets, w + p * kVectorBytes,
        w_stride, zeros, acc + p * kPanel, sums ? sums + p * kPanel : nullptr);
}
