// From the integer sums of a tile, in registers, to its output: groups and scales. Part of
// microkernel.inl.

// f(rows), or f(256 * hi + lo) where two rows of sums make one.
template <int MR, int V, class Call>
LOWBIT_INLINE void joined(const Tile& t, const Reg (&sum)[MR][V], Call call) {
  if constexpr (MR % 2 == 0) {
    if (t.planes == 2) {
      Reg both[MR / 2][V];
      LOWBIT_UNROLL for (int r = 0; r < MR / 2; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          both[r][v] = add(shift_left<8>(sum[2 * r][v]), sum[2 * r + 1][v]);
      return call(both);
    }
  }
  call(sum);
}

// Where the scales of a group begin, of the panel's channels; register v's are half_at farther.
inline ptrdiff_t group_at(const Tile& t, int panel, int64_t group) {
  return (panel * t.groups + group) * kPanel;
}
inline ptrdiff_t half_at(const Tile& t, int v) {
  return v / kRegs * t.groups * kPanel + v % kRegs * kLanes;
}

// f[r][c] = fma(group_scale, float(sum), f), from 0 in the first group; then the zero points' part.
template <bool First, int R, int V>
LOWBIT_INLINE void add_group(const Tile& t, int panel, int64_t group, const Reg (&sum)[R][V],
                             float* f) {
  const ptrdiff_t at = group_at(t, panel, group);
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
    const FloatReg scale = half_load(t.group_scale + at + half_at(t, v));
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
      float* p = f + (r * V + v) * kLanes;
      const FloatReg before = First ? float_splat(0.0f) : float_load(p);
      float_store(p, fmadd(scale, to_float(sum[r][v]), before));
    }
  }
  if (!t.group_zero) return;
  for (int r = 0; r < R; ++r) {
    const FloatReg s = float_broadcast(t.group_sum + r * t.groups + group);
    for (int v = 0; v < V; ++v) {
      float* p = f + (r * V + v) * kLanes;
      float_store(p, fmadd(half_load(t.group_zero + at + half_at(t, v)), s, float_load(p)));
    }
  }
}

// What Requantize says, in registers.
struct CodeRegs {
  FloatReg inverse, low, high, residual_scale;
  Reg zero, residual_zero;

  LOWBIT_INLINE explicit CodeRegs(const Requantize& to)
      : inverse(float_splat(to.inverse)),
        low(float_splat(to.low)),
        high(float_splat(to.high)),
        residual_scale(float_splat(to.residual_scale)),
        zero(splat_lanes(to.zero)),
        residual_zero(splat_lanes(to.residual_zero)) {}

  static LOWBIT_INLINE Reg splat_lanes(int32_t x) {
    int8_t four[4];
    __builtin_memcpy(four, &x, 4);
    return broadcast(four);
  }
  LOWBIT_INLINE FloatReg with_residual(FloatReg y, const int8_t* r) const {
    return float_add(y, multiply(to_float(sub(load_codes(r), residual_zero)), residual_scale));
  }
  // Saturates: storing does what the bounds would.
  template <bool Saturates>
  LOWBIT_INLINE void put(int8_t* q, FloatReg v) const {
    v = multiply(v, inverse);
    if constexpr (!Saturates) v = float_min(float_max(v, low), high);
    store_codes(q, add(nearest(v), zero));
  }
};

// The same as finish_tile, as codes.
template <bool Saturates, int R, int V, class Value>
LOWBIT_INLINE void put_tile(const Tile& t, int panel, Value f) {
  const CodeRegs code(*t.requantize);
  const float *const scale = t.scale + panel * kPanel, *const bias = t.bias + panel * kPanel;
  int8_t* const* const q = t.q;
  const int8_t* const* const residual = t.residual;
  const ptrdiff_t first = t.q_first + panel * kPanel;
  LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
    int8_t* const out = q[r] + first;
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
      FloatReg y = fmadd(f(r, v), float_load(scale + v * kLanes), float_load(bias + v * kLanes));
      if (residual) y = code.with_residual(y, residual[r] + first + v * kLanes);
      code.put<Saturates>(out + v * kLanes, y);
    }
  }
}

template <int R, int V, class Value>
LOWBIT_INLINE void finish_codes(const Tile& t, int panel, Value f) {
  if (t.requantize->saturates) return put_tile<true, R, V>(t, panel, f);
  put_tile<false, R, V>(t, panel, f);
}

// y = fma(f(r, v), row_scale * scale, bias). RowBias: of the row, see Tile::bias_pitch.
template <int R, int V, bool RowBias = false, class Value>
LOWBIT_INLINE void finish_tile(const Tile& t, int panel, Value f) {
  float* const y = t.y + panel * kPanel;
  const float *const scale = t.scale + panel * kPanel, *const row_scale = t.row_scale;
  const float* const bias = t.bias + (RowBias ? 0 : panel * kPanel);
  const ptrdiff_t pitch = t.y_pitch;
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
    const FloatReg s = float_load(scale + v * kLanes);
    FloatReg b = float_load(bias + (RowBias ? v % kRegs : v) * kLanes);
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) {
      if constexpr (RowBias) b = float_load(bias + r * kPanel + v % kRegs * kLanes);
      float_store(y + r * pitch + v * kLanes,
                  fmadd(f(r, v), multiply(float_broadcast(row_scale + r), s), b));
    }
  }
}

// Either from memory [R][V]: one function for all formats, where groups have taken long, or codes
// are rare.
template <int R, int V>
LOWBIT_NOINLINE void finish_stored(const Tile& t, int panel, const float* f) {
  const auto value = [&](int r, int v) { return float_load(f + (r * V + v) * kLanes); };
  if (t.requantize) return put_tile<false, R, V>(t, panel, value);
  if (t.bias_pitch) return finish_tile<R, V, true>(t, panel, value);
  finish_tile<R, V>(t, panel, value);
}

// The lines that this tile will write, or a later one, come while it computes.
template <int MR, int V>
LOWBIT_INLINE void fetch_output(const Tile& t, int panel) {
  const float* y = t.y_fetched + panel * kPanel;
  const int rows = t.planes == 2 ? MR / 2 : MR;
  for (int r = 0; r < rows; ++r, y += t.y_pitch)
    LOWBIT_UNROLL for (int v = 0; v < V; v += kRegs) __builtin_prefetch(y + v * kLanes, 1);
}

template <int MR, int V>
LOWBIT_INLINE void start_at_offset(const Tile& t, int64_t group, Reg (&sum)[MR][V]) {
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) {
    const Reg o = broadcast(reinterpret_cast<const int8_t*>(t.offset + r * t.offset_pitch + group));
    LOWBIT_UNROLL for (int v = 0; v < V; ++v) sum[r][v] = o;
  }
}

// The same in registers; `at`: where the scales of the group begin.
template <int R, int V>
LOWBIT_INLINE void add_group(const Tile& t, ptrdiff_t at, int64_t group, const Reg (&sum)[R][V],
                             FloatReg (&f)[R][V]) {
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
    const FloatReg s = half_load(t.group_scale + at + half_at(t, v));
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) f[r][v] = fmadd(s, to_float(sum[r][v]), f[r][v]);
  }
  const uint16_t* zero = t.group_zero;
  asm("" : "+r"(zero));  // one loop, not one for each answer
  if (!zero) return;
  LOWBIT_UNROLL for (int v = 0; v < V; ++v) {
    const FloatReg z = half_load(zero + at + half_at(t, v));
    LOWBIT_UNROLL for (int r = 0; r < R; ++r) f[r][v] =
        fmadd(z, float_broadcast(t.group_sum + r * t.groups + group), f[r][v]);
  }
}

// Groups combined in registers. group(first, sums) adds the products of a whole group to sums,
// rest(first, steps, sums) those of a shorter one.
template <int MR, int V, class Group, class Rest>
LOWBIT_INLINE void combine_groups(const Tile& t, int panel, Group group, Rest rest) {
  if (!t.requantize) fetch_output<MR, V>(t, panel);
  FloatReg f[MR][V];
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v) f[r][v] =
      float_splat(0.0f);
  ptrdiff_t at = group_at(t, panel, 0);
  const int64_t whole = t.steps / t.group_steps;
  for (int64_t g = 0; g < whole; ++g, at += kPanel) {
    Reg sum[MR][V];
    start_at_offset(t, g, sum);
    group(g * t.group_steps, sum);
    add_group(t, at, g, sum, f);
  }
  if (whole < t.groups) {
    Reg last[MR][V];  // not `sum`: what a function takes by address would stay in memory
    start_at_offset(t, whole, last);
    rest(whole * t.group_steps, t.steps - whole * t.group_steps, last);
    add_group(t, at, whole, last, f);
  }
  alignas(kVectorBytes) float room[MR * V * kLanes];
  LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
      float_store(room + (r * V + v) * kLanes, f[r][v]);
  finish_stored<MR, V>(t, panel, room);
}

// loop(first, steps, sums) adds a group's products to sums, which start at the offset.
template <int MR, int V, class Loop>
LOWBIT_INLINE void sum_groups(const Tile& t, int panel, Loop loop) {
  if (!t.sums && !t.requantize) fetch_output<MR, V>(t, panel);
  alignas(kVectorBytes) float room[MR * V * kLanes];
  // Known to be an array, GCC 12 keeps it in registers that it does not have, groups or no groups.
  float* f = room;
  asm("" : "+r"(f));
  for (int64_t g = 0; g < t.groups; ++g) {
    const int64_t first = g * t.group_steps, rest = t.steps - first;
    Reg sum[MR][V];
    start_at_offset(t, g, sum);
    loop(first, rest < t.group_steps ? rest : t.group_steps, sum);
    if (t.sums) {
      LOWBIT_UNROLL for (int r = 0; r < MR; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
          store(t.sums + r * kNr + panel * kPanel + v * kLanes, sum[r][v]);
      return;
    }
    if (!t.group_scale)
      return joined(t, sum, [&](const auto& rows) {
        constexpr int R = sizeof(rows) / sizeof(rows[0]);
        if constexpr (R == MR) {
          if (t.stored) {
            LOWBIT_UNROLL for (int r = 0; r < R; ++r) LOWBIT_UNROLL for (int v = 0; v < V; ++v)
                float_store(f + (r * V + v) * kLanes, to_float(rows[r][v]));
            return finish_stored<R, V>(t, panel, f);
          }
        }
        finish_tile<R, V>(t, panel, [&](int r, int v) { return to_float(rows[r][v]); });
      });
    joined(t, sum, [&](const auto& rows) {
      if (g == 0) return add_group<true>(t, panel, g, rows, f);
      add_group<false>(t, panel, g, rows, f);
    });
  }
  if (t.planes == 2) {
    if constexpr (MR % 2 == 0) finish_stored<MR / 2, V>(t, panel, f);
  } else {
    finish_stored<MR, V>(t, panel, f);
  }
}

// The same of rows in pieces: no groups, one plane, floats.
template <int MR, int V, class Loop>
LOWBIT_INLINE void sum_pieces(const Tile& t, int panel, Loop loop) {
  fetch_output<MR, V>(t, panel);
  Reg sum[MR][V];
  start_at_offset(t, 0, sum);
  loop(0, t.steps, sum);
  finish_tile<MR, V>(t, panel, [&](int r, int v) { return to_float(sum[r][v]); });
}
