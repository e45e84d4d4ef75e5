// The ISA's row of functions. Needs LOWBIT_KERNEL_NAME.
#define LOWBIT_STRING2(x) #x
#define LOWBIT_STRING(x) LOWBIT_STRING2(x)
#define LOWBIT_JOIN2(a, b) a##b
#define LOWBIT_JOIN(a, b) LOWBIT_JOIN2(a, b)

static_assert(kMr % 2 == 0 && kTallMr % 2 == 0, "an int16 row is two rows of a tile");

}  // namespace

extern const Kernel LOWBIT_JOIN(kKernel_, LOWBIT_KERNEL_NAME);
const Kernel LOWBIT_JOIN(kKernel_, LOWBIT_KERNEL_NAME) = {
    LOWBIT_STRING(LOWBIT_KERNEL_NAME),
    kMr,
    kNr,
    kTallMr,
    kTallPanels* kPanel,
    kGroupSums / (kTallPanels * kRegs) / 2 * 2,
    kSegments,
    room,
    {
#define X(name, bits, mul, add) Dot<bits, traits(Format::name).shift()>::run,
        LOWBIT_FORMATS(X)
#undef X
    },
    dot_centred,
    dot_rows,
    xnor_any,
    kColumnBytes,
    depthwise_tile,
    plane_tile,
    window_panels,
    grouped_tile,
    spread,
    amax_bits,
    add_abs,
    quantize8,
    quantize_row8,
    quantize16,
    saturate8,
    saturate16,
    binarize,
    binarize_bits,
    binarize_rows,
    sum_codes_of_groups,
    sum_rows,
    gather,
    encode_planes,
    encode_triples,
    encode_panels,
    value_rows,
    to_float,
    widen,
    narrow,
    madd,
    finish,
    apply,
    transpose,
    widen_scales,
    requantize,
    add_codes,
    multiply_codes,
    max_codes,
    total_codes,
    lookup,
    dequantize,
    fit,
    {probe_dot<8>, probe_dot<4>, probe_dot<2>, probe_dot<1>},
    probe_fma,
    probe_xnor,
    read_all,
};

}  // namespace lowbit
