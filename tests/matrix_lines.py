"""Lines as `lowbit.benchmark.runner` writes them, made up: every figure follows from a rate.

And `table`, which reads what became of them on a page.
"""

from lowbit.benchmark.shapes import parse

CEILINGS = {
    "dot8": 500e9,
    "dot4": 460e9,
    "dot2": 440e9,
    "dot1": 420e9,
    "fma": 125e9,
    "xnor": 2500e9,
    "read": 40e9,
    "l3": 100e9,
    "l2": 250e9,
    "l3_bytes": 32 << 20,
    "l2_bytes": 1 << 20,
}


def spread(ratio):
    """A ratio with a spread of a tenth."""
    return ratio and {"median": ratio, "p10": 0.9 * ratio, "p90": 1.1 * ratio}


def row(
    name,
    seconds,
    *,
    bits=8,
    activation_bits=8,
    own=False,
    peer=None,
    rivals=True,
    ratio=None,
    int8=None,
    float32=None,
    layout=None,
):
    """A row of a group; `ratio` is that to `peer`, `int8` and `float32` those to torch's."""
    return {
        "name": name,
        "timing": {"p50_seconds": seconds},
        "weight_bytes": 1 << 20,
        "own": own,
        "widths": [bits],
        "activation_bits": activation_bits,
        "bound": "dot8",
        "fraction_of_peak": 1e-3 / seconds,
        "layout": layout,
        "versus_torch_int8": spread(int8),
        "versus_float32": spread(float32),
        "fraction_of_bound": 1e-3 / seconds,
        "peer": peer,
        "peer_rivals": rivals,
        "versus_peer": spread(ratio),
    }


def line(
    rows,
    *,
    shape="1024x1024",
    m=1,
    threads=1,
    weights="cache",
    day=1,
    failed=None,
    op="linear",
    isa="avx512vnni",
):
    """A line of the file: one case with these rows."""
    parsed = parse(op, shape)
    if op == "linear":
        elements = parsed.k + parsed.n
    else:
        elements = parsed.inputs * parsed.size**2 + parsed.outputs * parsed.output_size**2
    ceilings = {name: threads * value for name, value in CEILINGS.items()}
    group = {
        "op": op,
        "shape": shape,
        "m": m,
        "threads": threads,
        "ceilings": {"threads": threads, **ceilings},
        "rotated_bytes": 256 << 20 if weights == "memory" else 0,
        "macs": parsed.macs(m),
        "activation_bytes": 4 * m * elements,
        "rows": rows,
        "failed": failed or {},
    }
    environment = {
        "cpu": {"model": "Abacus 9", "usable_cpus": 2, "caches": {"l1": 48 << 10, "l2": 1 << 20}},
        "isa": {"chosen": isa},
        "versions": {"lowbit": "0.1.0", "python": "3.11.7", "platform": "Linux"},
    }
    result = {
        "groups": [group],
        "missing": {"ggml": "not there"},
        "peers": {"torch-float32": "torch 2.13.0", "onnxruntime-int8": "onnx 1, onnxruntime 2"},
        "environment": environment,
    }
    case = {
        "shape": shape,
        "m": m,
        "threads": threads,
        "weights": weights,
        "formats": ["w8a8", "w1a8"],
        "peers": None,
        "isa": None,
        "seconds": 3.0,
        "op": op,
    }
    return {"case": case, "finished": f"2026-01-0{day}T10:00:00+00:00", "result": result}


def small_matrix():
    """Two shapes, M = 1 and 128, one and two threads; W8 wins, W1 loses at M = 128."""
    lines = []
    for threads in (1, 2):
        for shape in ("1024x1024", "768x3072"):
            for m in (1, 128):
                own8 = 1e-3 * m / threads**0.95
                rows = [
                    row("w8a8", own8, own=True, peer="torch int8", ratio=2.0),
                    row(
                        "w1a8",
                        own8,
                        bits=1,
                        own=True,
                        peer="torch int8",
                        rivals=False,
                        ratio=0.5 if m == 128 else 2.0,
                    ),
                    row("torch float32", 10 * own8, bits=32, activation_bits=32),
                    row("torch int8", 2 * own8),
                ]
                lines.append(line(rows, shape=shape, m=m, threads=threads, day=threads))
    return lines


CONV = {"dense 3x3": "64x64k3@14", "depthwise": "32x32k3g32@14", "7x7 map": "128x128k3@7"}


def conv_rows(fast=2.0):
    """W8A8, W4A8 and W1A1 in both layouts; `fast` times as quick as torch INT8."""
    rows = [row("torch int8 x86 channels_last", fast * 1e-3, layout="channels_last")]
    rows.append(row("torch codes x86 channels_last", 1e-3, layout="channels_last"))
    for name, bits, seconds in (("w8a8", 8, 1e-3), ("w4a8", 4, 1.04e-3), ("w1a1", 1, 0.25e-3)):
        ratios = {"int8": fast, "float32": 4.0, "ratio": fast, "peer": rows[0]["name"]}
        same = {"bits": bits, "own": True, "rivals": bits == 8, **ratios}
        rows.append(row(name, 1.2 * seconds, layout="nchw", **same))
        rows.append(row(f"{name} channels_last", seconds, layout="channels_last", **same))
    return rows


def small_conv_matrix():
    """Three shapes, batch 1 and 8, one and two threads."""
    return [
        line(conv_rows(), shape=shape, m=m, threads=threads, op="conv")
        for threads in (1, 2)
        for shape in CONV.values()
        for m in (1, 8)
    ]


def table(text, head):
    """Rows of the table whose head holds some words: first cell -> the others."""
    lines = text.splitlines()
    start = next(i for i, words in enumerate(lines) if words.startswith("|") and head in words)
    found = {}
    for words in lines[start + 2 :]:
        if not words.startswith("|"):
            break
        first, *others = (cell.strip() for cell in words.strip("|").split(" | "))
        found[first] = others
    return found
