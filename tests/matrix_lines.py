"""Lines as `lowbit.benchmark.matrix` writes them, made up: every figure follows from a rate."""

CEILINGS = {
    "dot": 500e9,
    "fma": 125e9,
    "xnor": 2500e9,
    "read": 40e9,
    "l3": 100e9,
    "l2": 250e9,
    "l3_bytes": 32 << 20,
    "l2_bytes": 1 << 20,
}


def row(name, seconds, *, bits=8, activation_bits=8, own=False, peer=None, rivals=True, ratio=None):
    """A row of a group; `ratio` is that to `peer`, with a spread of a tenth."""
    spread = ratio and {"median": ratio, "p10": 0.9 * ratio, "p90": 1.1 * ratio}
    return {
        "name": name,
        "timing": {"p50_seconds": seconds},
        "weight_bytes": 1 << 20,
        "own": own,
        "widths": [bits],
        "activation_bits": activation_bits,
        "bound": "dot",
        "fraction_of_bound": 1e-3 / seconds,
        "peer": peer,
        "peer_rivals": rivals,
        "versus_peer": spread,
    }


def line(rows, *, shape="1024x1024", m=1, threads=1, weights="cache", day=1, failed=None):
    """A line of the file: one case with these rows."""
    k, n = map(int, shape.split("x"))
    ceilings = {name: threads * value for name, value in CEILINGS.items()}
    group = {
        "op": "linear",
        "shape": shape,
        "m": m,
        "threads": threads,
        "ceilings": {"threads": threads, **ceilings},
        "rotated_bytes": 256 << 20 if weights == "memory" else 0,
        "macs": m * k * n,
        "activation_bytes": 4 * m * (k + n),
        "rows": rows,
        "failed": failed or {},
    }
    environment = {
        "cpu": {"model": "Abacus 9", "usable_cpus": 2, "caches": {"l1": 48 << 10, "l2": 1 << 20}},
        "isa": {"chosen": "avx512vnni"},
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
