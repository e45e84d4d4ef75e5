"""lowbit.benchmark: cases, candidates, peers and the structure of results. No timing asserted."""

import json

import pytest
import torch

from lowbit import _core
from lowbit.benchmark import ceilings as ceilings_module
from lowbit.benchmark import measure as measuring
from lowbit.benchmark.candidate import Candidate
from lowbit.benchmark.case import (
    CONV_SHAPES,
    FORMATS,
    LINEAR_SHAPES,
    convert,
    lowbit_candidates,
    make,
    padded_candidates,
)
from lowbit.benchmark.ceilings import ARITHMETIC, Ceilings, probe
from lowbit.benchmark.measure import measure, relative_error
from lowbit.benchmark.peers import PEERS
from lowbit.benchmark.peers.blocks import block_codes, pack_codes
from lowbit.benchmark.plot import plot
from lowbit.benchmark.result import Result
from lowbit.benchmark.run import Options, run

CEILINGS = Ceilings(
    threads=2, dot8=1e12, dot4=9e11, dot2=8e11, dot1=7e11, fma=2e11, xnor=5e12, read=4e10
)
QUICK = {"budget_seconds": 0.01, "min_rounds": 2, "probe_seconds": 0.003, "rotate_bytes": 0}

# Relative error of the output that rounding random weights to so many bits may cause.
ERROR = {"w8a8": 0.02, "w4a8": 0.1, "w2a8": 0.4, "w1a8": 0.75, "w1a1": 1.0, "w8a16": 0.02}


# The same for peers, per channel or group; 2 bits with the largest weight as a level lose half.
PEER_ERROR = {32: 1e-6, 16: 0.01, 8: 0.05, 4: 0.1, 2: 0.6, 1: 0.6}


@pytest.fixture(autouse=True)
def _one_thread(use_threads):
    use_threads(1)


def quick_measure(case, candidates, rotate_bytes=0):
    return measure(
        case, candidates, CEILINGS, rotate_bytes=rotate_bytes, budget_seconds=0.01, min_rounds=2
    )


@pytest.mark.parametrize(
    ("op", "shape", "m", "weight", "x", "macs"),
    [
        ("linear", "96x40", 3, (40, 96), (3, 96), 3 * 96 * 40),
        ("conv", "8x16k3@10", 2, (16, 8, 3, 3), (2, 8, 10, 10), 2 * 100 * 16 * 8 * 9),
        ("conv", "3x8k7s2@11", 1, (8, 3, 7, 7), (1, 3, 11, 11), 36 * 8 * 3 * 49),
        ("conv", "6x6k3g6@5", 1, (6, 1, 3, 3), (1, 6, 5, 5), 25 * 6 * 9),
    ],
)
def test_cases(op, shape, m, weight, x, macs):
    case = make(op, shape, m)
    assert case.layer.weight.shape == weight
    assert case.x.shape == x
    assert case.macs == macs
    if op == "conv":
        assert case.layer(case.x).shape[2] ** 2 * case.layer.weight.numel() * m == macs
    assert torch.equal(case.x, make(op, shape, m).x)


@pytest.mark.parametrize(("op", "shapes"), [("linear", LINEAR_SHAPES), ("conv", CONV_SHAPES)])
def test_default_options_are_valid(op, shapes):
    Options(op=op, shapes=shapes).check()


@pytest.mark.parametrize("op", ["linear", "conv"])
def test_lowbit_candidates_compute_the_layer(op):
    case = make(op, {"linear": "96x40", "conv": "8x16k3@10"}[op], 3)
    reference = case.layer(case.x).detach()
    candidates = lowbit_candidates(case, convert(case.layer, FORMATS))
    layouts = {"linear": [""], "conv": ["", " channels_last"]}[op]
    names = [name + layout for name in FORMATS for layout in layouts]
    assert [c.name for c in candidates] == names
    for candidate in candidates:
        error = relative_error(reference, candidate.build()(case.x))
        assert 0 < error < ERROR[candidate.name.split()[0]]


def test_static_candidates_are_calibrated_with_the_input():
    for op, shape in (("linear", "96x40"), ("conv", "8x16k3@10")):
        case = make(op, shape, 3)
        reference = case.layer(case.x).detach()
        for candidate in lowbit_candidates(case, convert(case.layer, ("w8a8-static",))):
            assert relative_error(reference, candidate.build()(case.x)) < ERROR["w8a8"]


def test_lowbit_candidates_know_their_ceiling_and_bytes():
    case = make("linear", "128x32", 1)
    layers = convert(case.layer, ("w8a8", "w4a8", "w1a1", "w8a16"))
    found = {c.name: c for c in lowbit_candidates(case, layers)}
    assert {name: (c.ceiling, c.passes) for name, c in found.items()} == {
        "w8a8": ("dot", 1),
        "w4a8": ("dot", 1),
        "w1a1": ("xnor", 1),
        "w8a16": ("dot", 2),
    }
    scales = 4 * 32
    assert [found[name].probe for name in found] == ["dot8", "dot4", "xnor", "dot8"]
    assert found["w8a8"].weight_bytes == 128 * 32 + scales
    assert found["w4a8"].weight_bytes == 128 * 32 // 2 + scales


@pytest.mark.parametrize(
    ("name", "op"),
    [(name, op) for name, peer in PEERS.items() for op in ("linear", "conv") if getattr(peer, op)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_peers_compute_the_layer(name, op, threads):
    peer = PEERS[name]
    if (reason := peer.missing()) is not None:
        pytest.skip(reason)
    torch.set_num_threads(threads)
    build = getattr(peer, op)
    case = make(op, {"linear": "256x48", "conv": "8x16k3@10"}[op], 3)
    with torch.inference_mode():
        reference = case.layer(case.x)
        candidates = build(case.layer, case.x, threads)
        assert candidates
        for candidate in candidates:
            first, second = candidate.build(), candidate.build()
            bound = 0.8 if candidate.activation_bits == 1 else PEER_ERROR[max(candidate.widths)]
            assert bound <= candidate.most_error
            assert relative_error(reference, first(case.x)) < bound, candidate.name
            assert relative_error(reference, second(case.x)) < bound, candidate.name
            assert candidate.weight_bytes > 0


def test_a_peer_without_its_package_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert PEERS["openvino"].missing() == "openvino not installed"
    assert PEERS["torch-float32"].missing() is None
    result = run(Options(shapes=("32x16",), m=(1,), formats=("w8a8",), **QUICK))
    needing = {name for name, peer in PEERS.items() if not name.startswith("torch")}
    assert set(result.missing) == needing
    assert set(result.peers) == set(PEERS) - needing
    assert "missing: openvino (openvino not installed)" in str(result)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_block_codes_round_to_nearest(bits):
    layer = torch.nn.Linear(64, 3)
    codes, scale = block_codes(layer, bits, 32)
    middle = 1 << (bits - 1)
    values = (codes.astype("float32") - middle) * scale
    error = abs(values.reshape(3, 64) - layer.weight.detach().numpy())
    # Within half a step of the weight; the levels are not symmetric, the last one is clipped.
    assert (error.reshape(3, 2, 32) <= scale * 0.5 + 1e-6).all()


def test_pack_codes_puts_the_first_code_lowest():
    codes = torch.tensor([[1, 2, 3, 0, 2, 2, 1, 3]], dtype=torch.uint8).numpy()
    assert pack_codes(codes, 2).tolist() == [[0b00111001, 0b11011010]]
    assert pack_codes(codes, 4).tolist() == [[0x21, 0x03, 0x22, 0x31]]
    assert pack_codes(codes, 8).tolist() == codes.tolist()


@pytest.mark.parametrize(("shape", "m"), [("100x70", 1), ("64x1", 200), ("33x32", 3)])
def test_padded_candidates_compute_the_ragged_layer(shape, m):
    case = make("linear", shape, m)
    reference = case.layer(case.x).detach()
    found = padded_candidates(case, FORMATS)
    assert [c.name for c in found] == [f"{name} padded" for name in FORMATS]
    with torch.inference_mode():
        for c in found:
            assert not c.own
            assert not c.rival
            assert 0 < relative_error(reference, c.build()(case.x)) < c.most_error
    assert padded_candidates(make("linear", "64x32", m), FORMATS) == []
    assert padded_candidates(make("conv", "3x8k3@5", m), FORMATS) == []


def test_padded_layers_are_timed_beside_the_ragged_ones():
    options = Options(shapes=("33x20",), m=(2,), formats=("w8a8",), peers=(), padded=True, **QUICK)
    (group,) = run(options).groups
    assert [row.name for row in group.rows] == ["w8a8", "w8a8 padded"]
    assert group.failed == {}


def test_convolutions_pass_over_peers_without_any():
    options = Options(op="conv", shapes=("4x8k3@6",), m=(1,), formats=("w8a8",), **QUICK)
    result = run(options)
    assert {*result.missing, *result.peers} == {n for n, peer in PEERS.items() if peer.conv}
    rows = {row.name: row for row in result.groups[0].rows}
    assert rows["w8a8"].layout == "nchw"
    assert rows["w8a8 channels_last"].layout == "channels_last"
    assert rows["w8a8 channels_last"].versus_peer.rounds >= 2


def candidate(name, output, weight_bytes=1000, ceiling="dot", passes=1, built=None):
    """A candidate that returns `output`, or raises it; `built` counts its copies."""

    def build():
        def forward(x):
            if isinstance(output, Exception):
                raise output
            return output

        if built is not None:
            built.append(name)
        return forward

    return Candidate(name, weight_bytes, build, ceiling, passes)


def test_measure_relates_figures_to_ceilings_and_references():
    case = make("linear", "64x32", 2)
    y = case.layer(case.x).detach()
    group = quick_measure(
        case,
        [
            candidate("w8a8", y),
            candidate("w8a16", y, passes=2),
            candidate("w1a1", y, ceiling="xnor"),
            candidate("torch float32", y, ceiling="fma"),
            candidate("torch int8 x86", y),
            candidate("torch int8 onednn", y),
        ],
    )
    rows = {row.name: row for row in group.rows}
    for row in rows.values():
        seconds = row.timing.p50
        assert row.macs_per_second == pytest.approx(case.macs / seconds)
        assert row.bytes_per_second == pytest.approx(1000 / seconds)
        assert row.fraction_of_read is None  # the weights were not rotated
        assert row.relative_error == 0
    assert rows["w8a8"].fraction_of_peak == pytest.approx(rows["w8a8"].macs_per_second / 1e12)
    assert rows["w8a16"].fraction_of_peak == pytest.approx(2 * rows["w8a16"].macs_per_second / 1e12)
    assert rows["w1a1"].fraction_of_peak == pytest.approx(rows["w1a1"].macs_per_second / 5e12)
    assert rows["torch float32"].versus_float32.median == 1
    best = min((rows[f"torch int8 {e}"] for e in ("x86", "onednn")), key=lambda r: r.timing.p50)
    assert best.versus_torch_int8.median == 1


def test_measure_rotates_through_copies():
    case = make("linear", "64x32", 2)
    built = []
    y = case.layer(case.x).detach()
    sides = [candidate("big", y, 3000, built=built), candidate("small", y, 100, built=built)]
    group = quick_measure(case, sides, rotate_bytes=7000)
    assert built == ["big"] * 3 + ["small"] * 70
    assert group.rotated_bytes == 7000
    assert all(row.fraction_of_read > 0 for row in group.rows)
    assert "weights from memory" in str(group)
    assert "of read" in str(group)


def test_measure_does_not_claim_memory_where_copies_do_not_suffice(monkeypatch):
    monkeypatch.setattr(measuring, "MAX_COPIES", 4)
    case = make("linear", "64x32", 2)
    built = []
    y = case.layer(case.x).detach()
    group = quick_measure(case, [candidate("small", y, 100, built=built)], rotate_bytes=401)
    assert built == ["small"]
    assert group.rotated_bytes == 0
    assert group.rows[0].fraction_of_read is None


def test_the_error_of_few_outputs_is_no_reason():
    case = make("linear", "64x32", 1)
    y = case.layer(case.x).detach()
    assert [row.name for row in quick_measure(case, [candidate("far", 3 * y)]).rows] == ["far"]
    assert quick_measure(case, [candidate("nan", y * float("nan"))]).rows == []
    case = make("linear", "64x32", 2)
    y = case.layer(case.x).detach()
    assert quick_measure(case, [candidate("far", 3 * y)]).rows == []


def test_measure_names_what_failed():
    case = make("linear", "64x32", 2)
    y = case.layer(case.x).detach()
    sides = [
        candidate("good", y),
        candidate("bad", RuntimeError("Exception from core.cpp:1\nno such kernel\n")),
        candidate("silent", ValueError()),
        candidate("wrong", y[:1]),
    ]
    group = quick_measure(case, sides)
    assert [row.name for row in group.rows] == ["good"]
    assert group.failed == {
        "bad": "RuntimeError: no such kernel",
        "silent": "ValueError",
        "wrong": "ValueError: output shape [1, 32], expected [2, 32]",
    }
    assert "bad: failed: RuntimeError: no such kernel" in str(group)
    assert quick_measure(case, sides[1:]).rows == []


@pytest.mark.parametrize(
    ("seconds", "untimed"), [(1e-5, 500), (2e-3, 5), (4e-3, 3), (0.019, 1), (0.02, 0)]
)
def test_a_core_that_slept_wakes_before_it_is_timed(monkeypatch, seconds, untimed):
    slept, called = [], []
    monkeypatch.setattr(measuring.time, "sleep", slept.append)
    sides = {"a": lambda: called.append("a")}
    settled = measuring._settled(sides, {"a": seconds}, calls=2)
    assert list(settled) == ["before a", "a"]
    for rounds in (1, 2):
        for _ in range(2):  # as often as a side is called in a round
            settled["before a"]()
        assert slept == [measuring.SPIN_SECONDS] * rounds
        assert called == ["a"] * untimed * rounds


def test_probe_scales_with_threads_and_is_positive():
    ceilings = probe(1, 0.003)
    assert ceilings.threads == 1
    assert min(map(ceilings.macs_per_second, ARITHMETIC)) > 0
    assert ceilings.read > 0
    assert ceilings.macs_per_second("xnor") == ceilings.xnor
    assert ceilings.macs_per_second("dot2") == ceilings.dot2
    assert "GMAC/s" in str(ceilings)


@pytest.fixture(scope="module", autouse=True)
def _small_probe():
    """Ceilings are not what is tested here: do not fill half a gigabyte for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings_module, "READ_BYTES", 1 << 20)
        yield


@pytest.fixture(scope="module")
def result() -> Result:
    options = Options(
        shapes=("64x48",),
        m=(1, 3),
        threads=(1, 2),
        formats=("w8a8", "w1a1"),
        peers=("torch-float32", "torch-int8"),
        **QUICK,
    )
    return run(options)


def test_result_has_every_case(result):
    found = [(g.ceilings.threads, g.shape, g.m) for g in result.groups]
    assert found == [(1, "64x48", 1), (1, "64x48", 3), (2, "64x48", 1), (2, "64x48", 3)]
    for group in result.groups:
        names = [row.name for row in group.rows]
        assert names[:3] == ["w8a8", "w1a1", "torch float32"]
        assert any(name.startswith("torch int8") for name in names)
        assert group.failed == {}


def test_result_as_json(result):
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["environment"]["isa"]["chosen"] == _core.isa()
    row = data["groups"][0]["rows"][0]
    assert row["name"] == "w8a8"
    assert row["timing"]["rounds"] >= 2
    assert row["versus_float32"]["median"] > 0
    assert data["groups"][0]["ceilings"]["dot4"] > 0


def test_result_as_text(result):
    text = str(result)
    assert "linear 64x48, M=3, 2 threads, same weights each call" in text
    assert text.count("torch float32") == 4
    assert "ceilings, 1 thread:" in text
    assert max(map(len, text.splitlines())) <= 120


def test_run_leaves_no_traces():
    isa, engine = _core.isa(), torch.backends.quantized.engine
    options = Options(
        shapes=("32x16",), m=(1,), threads=(2,), formats=("w8a8",), isa="scalar", **QUICK
    )
    assert run(options).environment["isa"]["chosen"] == "scalar"
    assert _core.isa() == isa
    assert torch.get_num_threads() == 1
    assert torch.backends.quantized.engine == engine


def test_a_peer_that_breaks_is_named(monkeypatch):
    def breaks(*arguments):
        raise OSError("gone")

    peer = PEERS["torch-int8"]
    monkeypatch.setitem(PEERS, "torch-int8", type(peer)("torch-int8", linear=breaks))
    peers = ("torch-float32", "torch-int8")
    options = Options(shapes=("32x16",), m=(1,), formats=(), peers=peers, **QUICK)
    (group,) = run(options).groups
    assert [row.name for row in group.rows] == ["torch float32"]
    assert group.failed == {"torch-int8": "OSError: gone"}


def test_plot(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot(result, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="torch-float32"):
        plot(Result([], {}, {}, result.environment), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
