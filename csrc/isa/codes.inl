// Codes of activations: their sums, and how they get from one order to another. Part of
// microkernel.inl.

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

// Groups are multiples of 32, or all there is.
void sum_codes_of_groups(const int8_t* q, int64_t n, int64_t group, int32_t* out) {
  constexpr int64_t kBlock = 4096;
  int32_t lanes[kBlock / 4];
  for (int64_t first = 0; first < n; first += group, ++out) {
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

// Up to 63 bytes after a row are read.
void sum_rows(const int8_t* rows, ptrdiff_t pitch, int64_t count, int64_t k, int32_t* out) {
  const int64_t whole = k / kVectorBytes * kVectorBytes;
  uint8_t last[kVectorBytes];
  for (int64_t i = 0; i < kVectorBytes; ++i) last[i] = i < k - whole;
  for (int64_t r = 0; r < count; ++r, rows += pitch) {
    const uint8_t* a = reinterpret_cast<const uint8_t*>(rows);
    Reg sum[kRegs];
    for (int i = 0; i < kRegs; ++i) sum[i] = zero();
    for (int64_t at = 0; at < whole; at += kVectorBytes)
      for (int i = 0; i < kRegs; ++i)
        sum[i] = dot<1>(sum[i], bytes(1), load(a + at + i * kRegBytes));
    if (k > whole)
      for (int i = 0; i < kRegs; ++i)
        sum[i] = dot<1>(sum[i], load(last + i * kRegBytes), load(a + whole + i * kRegBytes));
    for (int i = 1; i < kRegs; ++i) sum[0] = add(sum[0], sum[i]);
    int32_t lanes[kLanes], total = 0;
    store(lanes, sum[0]);
    for (int i = 0; i < kLanes; ++i) total += lanes[i];
    out[r] = total;
  }
}

template <int Bytes>
LOWBIT_INLINE void gather_rows(const int8_t* from, ptrdiff_t stride, int64_t count,
                               const ptrdiff_t* segments, int64_t segment_count, int64_t bytes,
                               int8_t* to, ptrdiff_t pitch) {
  for (int64_t i = 0; i < count; ++i, from += stride, to += pitch)
    for (int64_t s = 0; s < segment_count; ++s)
      for (int64_t at = 0; at < bytes; at += Bytes)
        __builtin_memcpy(to + s * bytes + at, from + segments[s] + at, Bytes);
}

void gather(const int8_t* from, ptrdiff_t stride, int64_t count, const ptrdiff_t* segments,
            int64_t segment_count, int64_t bytes, int8_t* to, ptrdiff_t pitch) {
  const auto run = bytes <= 4    ? gather_rows<4>
                   : bytes <= 16 ? gather_rows<16>
                   : bytes <= 32 ? gather_rows<32>
                                 : gather_rows<64>;
  run(from, stride, count, segments, segment_count, bytes, to, pitch);
}

void interleave4(const int8_t* const* rows, int64_t count, int8_t* out) {
  for (int64_t i = 0; i < count; i += 16) {
    Reg v[kRegs];
    interleave(rows[0] + i, rows[1] + i, rows[2] + i, rows[3] + i, v);
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r)
        store(reinterpret_cast<int32_t*>(out + 4 * i) + r * (kRegBytes / 4), v[r]);
  }
}

// Rows are 64 bytes and may be read whole.
void transpose4(const int8_t* rows, int count, int channels, int8_t* out, ptrdiff_t pitch) {
  for (int i = 0; i < count; i += 16) {
    Reg v[kRegs];
    interleave(rows + i, rows + 64 + i, rows + 128 + i, rows + 192 + i, v);
    int32_t pixels[16];
    LOWBIT_UNROLL for (int r = 0; r < kRegs; ++r) store(pixels + r * (kRegBytes / 4), v[r]);
    const int n = count - i < 16 ? count - i : 16;
    if (channels == 4) {
      for (int j = 0; j < n; ++j) __builtin_memcpy(out + (i + j) * pitch, pixels + j, 4);
    } else {
      for (int j = 0; j < n; ++j)
        for (int c = 0; c < channels; ++c)
          out[(i + j) * pitch + c] = static_cast<int8_t>(pixels[j] >> (8 * c));
    }
  }
}
