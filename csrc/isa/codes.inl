// Codes of activations: their sums, receptive fields. Part of microkernel.inl.

// lanes[i] = q[4i] + .. + q[4i + 3], for n codes and zeros up to a multiple of 64.
inline void sum_quads(const int8_t* q, int64_t n, int32_t* lanes) {
  const auto add = [&](const int8_t* from, int64_t at) {
    for (int i = 0; i < kRegs; ++i)
      store(lanes + at / 4 + i * kLanes,
            dot<1>(zero(), bytes(1), load(reinterpret_cast<const uint8_t*>(from) + i * kRegBytes)));
  };
  int64_t i = 0;
  for (; i + kVectorBytes <= n; i += kVectorBytes) add(q + i, i);
  if (i == n) return;
  int8_t last[kVectorBytes] = {};
  __builtin_memcpy(last, q + i, static_cast<size_t>(n - i));
  add(last, i);
}

using Lanes = int32_t __attribute__((vector_size(kLanes * 4)));

// a and b, lane by lane in turn.
template <class V>
LOWBIT_INLINE void zip(const V& a, const V& b, V& low, V& high) {
  constexpr int kCount = sizeof(a) / sizeof(a[0]);
  if constexpr (kCount == 16) {
    low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    high =
        __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (kCount == 8) {
    low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  }
}

// A square: each round deals the rows of both halves out in turn.
template <class V, int N>
LOWBIT_INLINE void transpose_square(V (&a)[N]) {
  static_assert(sizeof(V) == N * sizeof(a[0][0]), "as many rows as lanes");
  V b[N];
  LOWBIT_UNROLL for (int round = 1; round < N; round *= 2) {
    LOWBIT_UNROLL for (int i = 0; i < N / 2; ++i) zip(a[i], a[i + N / 2], b[2 * i], b[2 * i + 1]);
    LOWBIT_UNROLL for (int i = 0; i < N; ++i) a[i] = b[i];
  }
}

// out = sums of neighbouring lanes: those of a, then those of b.
template <class Ints>
LOWBIT_INLINE void add_pairs(const Ints& a, const Ints& b, Ints& out) {
  constexpr int kCount = sizeof(a) / 4;
  if constexpr (kCount == 16)
    out = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  else if constexpr (kCount == 8)
    out = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  else
    out = __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
}

// Up to 63 bytes after a row are read. As many rows as a register has lanes are summed together.
void sum_rows(const int8_t* rows, ptrdiff_t pitch, int64_t count, int64_t k, int32_t* out) {
  const int64_t whole = k / kVectorBytes * kVectorBytes;
  uint8_t last[kVectorBytes];
  for (int64_t i = 0; i < kVectorBytes; ++i) last[i] = i < k - whole;
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t here = count - first < kLanes ? count - first : kLanes;
    // Fewer rows than lanes: the last one again, whose sums are not stored.
    const uint8_t* a[kLanes];
    Reg sum[kLanes];
    LOWBIT_UNROLL for (int r = 0; r < kLanes; ++r) {
      a[r] = reinterpret_cast<const uint8_t*>(rows + (first + (r < here ? r : here - 1)) * pitch);
      sum[r] = zero();
    }
    for (int64_t at = 0; at < whole; at += kRegBytes)
      LOWBIT_UNROLL for (int r = 0; r < kLanes; ++r) sum[r] =
          dot<1>(sum[r], bytes(1), load(a[r] + at));
    if (k > whole)
      LOWBIT_UNROLL for (int i = 0; i < kRegs; ++i) LOWBIT_UNROLL for (int r = 0; r < kLanes; ++r)
          sum[r] = dot<1>(sum[r], load(last + i * kRegBytes), load(a[r] + whole + i * kRegBytes));
    Lanes sums[kLanes];
    LOWBIT_UNROLL for (int r = 0; r < kLanes; ++r)
        __builtin_memcpy(&sums[r], &sum[r], sizeof(Lanes));
    LOWBIT_UNROLL for (int n = kLanes / 2; n > 0; n /= 2) LOWBIT_UNROLL for (int i = 0; i < n; ++i)
        add_pairs(sums[2 * i], sums[2 * i + 1], sums[i]);
    if (here == kLanes)
      __builtin_memcpy(out + first, &sums[0], sizeof(Lanes));
    else
      for (int64_t r = 0; r < here; ++r) out[first + r] = sums[0][r];
  }
}

// Groups are multiples of 32, or all there is.
void sum_codes_of_groups(const int8_t* q, int64_t n, int64_t group, int32_t* out) {
  constexpr int64_t kBlock = 4096, kFew = 4;
  int32_t lanes[kBlock / 4];
  // As rows, but for the last ones, behind which nothing may be read.
  const int64_t read = (group + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
  const int64_t rows = n / group <= kFew ? 0 : (n - read) / group;
  if (rows > 0) sum_rows(q, group, rows, group, out), out += rows;
  for (int64_t first = rows * group; first < n; first += group, ++out) {
    const int64_t end = first + group < n ? first + group : n;
    int32_t s = 0;
    for (int64_t at = first; at < end; at += kBlock) {
      const int64_t count = end - at < kBlock ? end - at : kBlock;
      sum_quads(q + at, count, lanes);
      for (int64_t i = 0; i < (count + 3) / 4; ++i) s += lanes[i];
    }
    *out = s;
  }
}

// Bytes are copied in pieces of `Piece`; Whole: one is enough.
template <int Piece, bool Whole>
void gather_rows(const int8_t* from, ptrdiff_t stride, int64_t count, const ptrdiff_t* segments,
                 int64_t segment_count, int64_t bytes, int8_t* to, ptrdiff_t pitch) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += pitch) {
    int8_t* out = to;
    for (int64_t s = 0; s < segment_count; ++s, out += bytes) {
      const int8_t* in = from + segments[s];
      if constexpr (Whole)
        __builtin_memcpy(out, in, Piece);
      else
        for (int64_t at = 0; at < bytes; at += Piece) __builtin_memcpy(out + at, in + at, Piece);
    }
  }
}

void gather(const int8_t* from, ptrdiff_t stride, int64_t count, const ptrdiff_t* segments,
            int64_t segment_count, int64_t bytes, int8_t* to, ptrdiff_t pitch) {
  const auto run = bytes <= 4    ? gather_rows<4, true>
                   : bytes <= 16 ? gather_rows<16, true>
                   : bytes <= 32 ? gather_rows<32, true>
                   : bytes <= 64 ? gather_rows<64, true>
                                 : gather_rows<64, false>;
  run(from, stride, count, segments, segment_count, bytes, to, pitch);
}
