"""lowbit.benchmark.peers: what does not need their packages; what they compute: test_benchmark."""

import dataclasses

import pytest
import torch

from lowbit.benchmark.candidate import MOST_ERROR, Candidate
from lowbit.benchmark.case import make
from lowbit.benchmark.ceilings import Ceilings
from lowbit.benchmark.measure import fastest_peer, measure, relative_error
from lowbit.benchmark.peers import PEERS, Peer, ggml_library
from lowbit.benchmark.peers.blocks import block_codes, signed_codes, uint8_range
from lowbit.timing import Timing

DOTS = (1e12, 9e11, 8e11, 7e11)  # of 8, 4, 2 and 1 bits
CEILINGS = Ceilings(1, 5e11, 4e11, 3e11, 2e11, fma=1e11, xnor=2e12, read=4e10)


def peer(name, *widths, activation_bits=8):
    return Candidate(name, 1, lambda: None, "dot", widths=widths, activation_bits=activation_bits)


ENGINES = [
    peer("int8", 8),
    peer("int8 slow", 8),
    peer("int4", 4),
    peer("int4 float", 4, activation_bits=16),
    peer("ternary", 2, 1),
    peer("bits", 1, activation_bits=1),
    peer("float32", 32, activation_bits=32),
]
TIMINGS = {
    name: Timing(0.0, (seconds,))
    for name, seconds in (
        ("int8", 5.0),
        ("int8 slow", 9.0),
        ("int4", 4.0),
        ("int4 float", 8.0),
        ("ternary", 3.0),
        ("bits", 1.0),
        ("float32", 0.5),
    )
}


@pytest.mark.parametrize(
    ("bits", "activation_bits", "fastest", "rivals"),
    [
        (8, 8, "int8", True),
        (4, 8, "int4", True),
        (4, 16, "int4 float", True),  # int8 activations are coarser than what was asked for
        (2, 8, "ternary", True),
        (1, 8, "ternary", True),  # not the one with binary activations
        (1, 1, "bits", True),
        (8, 16, "int8", False),  # nobody offers it: the 8-bit ones
        (2, 16, "int8", False),
    ],
)
def test_the_fastest_peer_of_a_width(bits, activation_bits, fastest, rivals):
    own = Candidate(
        "own", 1, lambda: None, "dot", widths=(bits,), activation_bits=activation_bits, own=True
    )
    found = fastest_peer(own, [own, *ENGINES], TIMINGS)
    assert found.name == fastest
    assert own.rivals(found) is rivals


def test_without_peers_nothing_is_fastest():
    own = Candidate("own", 1, lambda: None, "dot", own=True)
    assert fastest_peer(own, [own, ENGINES[-1]], TIMINGS) is None


def test_a_layer_is_held_against_peers_of_its_layout():
    nchw = Candidate("own", 1, lambda: None, "dot", own=True, layout="nchw")
    last = dataclasses.replace(nchw, layout="channels_last")
    peers = [
        dataclasses.replace(peer("int8", 8), layout="channels_last"),
        dataclasses.replace(peer("int8 slow", 8), layout="nchw"),
    ]
    assert fastest_peer(nchw, [nchw, *peers], TIMINGS).name == "int8 slow"
    assert fastest_peer(last, [nchw, *peers], TIMINGS).name == "int8"
    assert fastest_peer(last, [nchw, peers[1]], TIMINGS).name == "int8 slow"  # it prefers that


def test_what_is_no_rival_is_not_raced():
    own = Candidate("own", 1, lambda: None, "dot", own=True)
    bare = dataclasses.replace(peer("int8", 8), rival=False)
    assert fastest_peer(own, [own, bare, peer("int8 slow", 8)], TIMINGS).name == "int8 slow"
    assert fastest_peer(own, [own, bare], TIMINGS) is None


CONVOLUTIONS = [
    "16x24k3@8",
    "16x24k1s2@9",
    "3x8k7s2@15",
    "8x8k5g8@9",
    "8x8k3s2g8@9",
    "8x16k3d2g2@9",
]


@pytest.mark.parametrize("name", [name for name, found in PEERS.items() if found.conv])
@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_every_kind_of_convolution(name, shape):
    if (reason := PEERS[name].missing()) is not None:
        pytest.skip(reason)
    case = make("conv", shape, 2)
    with torch.inference_mode():
        reference = case.layer(case.x)
        for candidate in PEERS[name].conv(case.layer, case.x, 1):
            y = candidate.build()(case.x)
            assert relative_error(reference, y) < (0.05 if 8 in candidate.widths else 0.01)
            assert candidate.layout in ("nchw", "channels_last")
            assert ("channels_last" in candidate.name) == (candidate.layout == "channels_last")
            if candidate.layout == "channels_last":
                assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_bare_operator_ends_in_codes_and_is_no_rival():
    case = make("conv", "16x24k3@8", 2)
    with torch.inference_mode():
        found = PEERS["torch-int8"].conv(case.layer, case.x, 1)
        outputs = {c.name: c.build()(case.x) for c in found}
    bare = {c.name for c in found if not c.rival}
    assert bare == {name for name, y in outputs.items() if y.is_quantized}
    assert all(name.startswith("torch codes") for name in bare)
    assert len(bare) * 3 == len(found)


def test_nonsense_is_not_timed():
    case = make("linear", "64x32", 2)
    y = case.layer(case.x).detach()
    outputs = {"good": y * (1 + 0.9 * MOST_ERROR[4]), "bad": y * 1.3, "nan": y * float("nan")}
    candidates = [
        Candidate(name, 1000, lambda output=output: lambda x: output, "dot", widths=(4,))
        for name, output in outputs.items()
    ]
    group = measure(case, candidates, CEILINGS, rotate_bytes=0, budget_seconds=0.01, min_rounds=2)
    assert [row.name for row in group.rows] == ["good"]
    assert set(group.failed) == {"bad", "nan"}
    assert "relative error 0.3, at most 0.2" in group.failed["bad"]


def test_a_bound_is_where_the_weights_lie():
    ceilings = Ceilings(2, *DOTS, 1e11, 1e12, 4e10, l3=1e11, l2=4e11, l3_bytes=1 << 20, l2_bytes=99)
    assert ceilings.bytes_per_second(99, from_memory=False) == ("l2", 4e11)
    assert ceilings.bytes_per_second(100, from_memory=False) == ("l3", 1e11)
    assert ceilings.bytes_per_second(1 << 21, from_memory=False) == ("read", 4e10)
    assert ceilings.bytes_per_second(99, from_memory=True) == ("read", 4e10)
    unknown = Ceilings(1, *DOTS, 1e11, 1e12, 4e10)
    assert unknown.bytes_per_second(1, from_memory=False) == ("read", 4e10)


@pytest.mark.parametrize(("macs", "bound"), [(1e3, "l3"), (1e9, "dot8")])
def test_the_larger_of_two_times_bounds(macs, bound):
    from lowbit.benchmark.measure import _rows

    ceilings = Ceilings(1, 5e11, *DOTS[1:], 1e11, 2e12, 4e10, l3=1e11, l3_bytes=1 << 20)
    case = make("linear", "64x32", 2)
    object.__setattr__(case, "macs", macs)
    own = Candidate("own", 1000, lambda: None, "dot", own=True)
    (row,) = _rows(case, [own], {"own": Timing(1.0, (1.0,))}, {"own": 0.0}, ceilings, 9, False)
    assert row.bound == bound
    assert row.fraction_of_bound == max(1000 / 1e11, macs / 5e11)


def test_signed_codes_round_each_channel():
    layer = torch.nn.Linear(64, 3)
    codes, scale = signed_codes(layer)
    assert codes.dtype == "int8"
    assert (abs(codes.astype(int)).max(axis=1) == 127).all()
    error = abs(codes * scale[:, None] - layer.weight.detach().numpy())
    assert (error <= scale[:, None] * 0.5 + 1e-7).all()
    unsigned, same = block_codes(layer, 8, 64)
    assert (unsigned.reshape(3, 64).astype(int) - 128 == codes).all()
    assert (same.reshape(-1) == scale).all()


def test_ranges_of_uint8():
    scale, zero = uint8_range(torch.tensor([-1.0, 4.1]))
    assert (scale, zero) == (pytest.approx(5.1 / 255), 50)
    assert uint8_range(torch.tensor([2.0, 5.1])) == (pytest.approx(5.1 / 255), 0)
    assert uint8_range(torch.zeros(3)) == (1.0, 0)


def test_versions():
    assert PEERS["torch-bfloat16"].version() == f"torch {torch.__version__}"
    assert Peer("numbers", requires=("numpy", "pytest")).version().startswith("numpy ")
    assert Peer("own", tell_version=lambda: "own 3").version() == "own 3"


def test_weight_only_operators_are_not_offered_where_they_fail():
    """The int8 operator of torch ends the process where K is no multiple of its vectors."""
    build = PEERS["torch-weight-only"].linear
    case = make("linear", "1000x32", 1)
    assert build(case.layer, case.x, 1) == []
    case = make("linear", "96x24", 1)
    assert [c.name for c in build(case.layer, case.x, 1)] == ["torch weight-only int8"]


def test_ggml_is_found_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv(ggml_library.VARIABLE, str(tmp_path))
    (tmp_path / "libggml-base.so").touch()
    assert ggml_library.find() is None
    assert str(tmp_path) in ggml_library.absent()
    assert PEERS["ggml"].missing() == ggml_library.absent()
    for name in ("libggml-cpu.so", "libggml-cpu.so.0"):
        (tmp_path / name).touch()
    assert [path.name for path in ggml_library.find()] == ["libggml-base.so", "libggml-cpu.so"]
    assert ggml_library.absent() is None


def test_ggml_is_found_in_its_package(tmp_path, monkeypatch):
    monkeypatch.delenv(ggml_library.VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert ggml_library.absent() == "llama-cpp-python not installed, and LOWBIT_GGML not set"
    with pytest.raises(OSError, match="not installed"):
        ggml_library.load.__wrapped__()


def test_ggml_computes_on_the_tensor_that_it_was_built_for():
    if (reason := ggml_library.absent()) is not None:
        pytest.skip(reason)
    case = make("linear", "256x48", 3)
    with torch.inference_mode():
        (first, *_) = PEERS["ggml"].linear(case.layer, case.x, 1)
        forward = first.build()
        assert forward(case.x).shape == (3, 48)
        with pytest.raises(ValueError, match="built for"):
            forward(case.x.clone())


def test_ggml_without_a_bias():
    if (reason := ggml_library.absent()) is not None:
        pytest.skip(reason)
    layer = torch.nn.Linear(256, 48, bias=False)
    x = torch.randn(5, 256)
    with torch.inference_mode():
        for candidate in PEERS["ggml"].linear(layer, x, 1):
            y, reference = candidate.build()(x), layer(x)
            assert (y - reference).norm() / reference.norm() < candidate.most_error
