// What the NEON kernels share: tiles narrower than a panel, offsets of centred codes. Part of
// microkernel.inl.

constexpr int kHalf = kPanel / 2;

// The channels of a panel from its `first` on.
inline Tile channels_of(const Tile& t, int first) {
  Tile part = t;
  part.w += first * 4;
  if (t.sums) part.sums += first;
  if (t.group_scale) part.group_scale += first;
  if (t.group_zero) part.group_zero += first;
  part.scale += first;
  part.bias += first;
  part.y += first;
  part.y_fetched += first;
  part.q_first += first;
  return part;
}

// A group's end, in steps.
inline int64_t steps_of(const Tile& t, int64_t group) {
  const int64_t rest = t.steps - group * t.group_steps;
  return rest < t.group_steps ? rest : t.group_steps;
}

// offsets[row][group] of centred codes: 128 * sum(a) more.
inline void centre_offsets(const Tile& t, int32_t* offsets) {
  for (int r = 0; r < t.rows; ++r)
    for (int64_t g = 0; g < t.groups; ++g) {
      const int8_t* a = t.codes + r * t.pitch + g * t.group_steps * 4;
      const int64_t k = steps_of(t, g) * 4;
      Reg sum = zero();
      int64_t i = 0;
      for (; i + kRegBytes <= k; i += kRegBytes)
        sum = dot<1>(sum, bytes(1), lanes_of(vld1q_s8(a + i)));
      int32_t total = vaddvq_s32(sum);
      for (; i < k; ++i) total += a[i];
      *offsets++ = t.offset[r * t.offset_pitch + g] + 128 * total;
    }
}
