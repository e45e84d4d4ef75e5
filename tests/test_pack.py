"""The packed layout, byte by byte: a file written today must be read by every later version."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit import _core
from lowbit.packed import groups_padding_is_zero, pack_groups, unpack_groups


def test_tables_are_the_oracles():
    expected = {f.name: (f.bits, f.mul, f.add) for f in oracle.FORMATS.values()}
    assert expected == _core.FORMATS
    assert list(_core.FORMATS) == list(expected), "the index of a format is part of the interface"
    assert tuple(_core.ACTIVATIONS) == oracle.ACTIVATIONS
    assert _core.LAYOUT_VERSION == 2


# The first four bytes of a panel, which are those of its channel 0, for codes written out by hand.
FIRST_BYTES = {
    "int8": ([0x01, 0x80, 0xFE, 0xFF], [0x01, 0x80, 0xFE, 0xFF]),
    "int4": ([1, 2, 3, 4, 5, 6, 7, 15], [0x51, 0x62, 0x73, 0xF4]),
    "int2": (
        [0, 1, 2, 3, 1, 1, 1, 1, 2, 2, 2, 2, 3, 0, 3, 0],
        [0b11_10_01_00, 0b00_10_01_01, 0b11_10_01_10, 0b00_10_01_11],
    ),
    "ternary": (
        [2, 1, 0, 2, 0, 0, 1, 1, 0, 0, 0, 2, 1, 2, 0, 0],
        [0b01_00_00_10, 0b10_00_00_01, 0b00_00_01_00, 0b00_10_01_10],
    ),
    # k = 4p + j is bit p of byte j: byte 0 holds k = 0, 4, 8, ... 28
    "binary": (
        [1, 0, 0, 1] + [0, 1, 0, 1] * 3 + [0, 0, 1, 1] * 4,
        [0b00000001, 0b00001110, 0b11110000, 0b11111111],
    ),
}


def test_first_bytes_by_hand(fmt):
    codes, expected = FIRST_BYTES[fmt]
    packed = _core.pack(np.array([codes], np.uint8), fmt)
    assert packed.shape == (1, 1, 64)
    assert packed.dtype == np.uint8
    assert packed[0, 0, :4].tolist() == expected
    assert not packed[0, 0, 4:].any()


def test_channels_and_steps_by_hand(fmt):
    """A single code of 1: panel n // 16, bytes from 4 * (n % 16), step k // depth."""
    f = oracle.FORMATS[fmt]
    n, k = 40, 3 * f.depth
    for channel, index in ((0, 0), (15, 1), (16, 4 % f.depth), (39, f.depth), (17, k - 1)):
        codes = np.zeros((n, k), np.uint8)
        codes[channel, index] = 1
        packed = _core.pack(codes, fmt)
        assert packed.shape == (3, 3, 64)
        (where,) = np.argwhere(packed)
        within = index % f.depth
        byte = 4 * (channel % 16) + within % 4
        assert where.tolist() == [channel // 16, index // f.depth, byte]
        assert packed[tuple(where)] == 1 << (f.bits * (within // 4))


@given(data=st.data(), n=st.integers(1, 70), k=st.integers(1, 150))
def test_equals_the_oracle_and_unpacks(fmt, data, n, k):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    codes = oracle.random_codes(rng, fmt, (n, k))
    packed = _core.pack(codes, fmt)
    np.testing.assert_array_equal(packed, oracle.pack(codes, fmt))
    np.testing.assert_array_equal(_core.unpack(packed, fmt, n, k), codes)
    assert _core.padding_is_zero(packed, fmt, n, k)


def test_every_code_that_fits_is_legal(fmt):
    codes = np.arange(oracle.FORMATS[fmt].max_code + 1, dtype=np.uint8)[None]
    unpacked = _core.unpack(_core.pack(codes, fmt), fmt, *codes.shape)
    np.testing.assert_array_equal(unpacked, codes)


@pytest.mark.parametrize("fmt", ["int4", "int2", "ternary", "binary"])
def test_codes_that_do_not_fit_are_refused(fmt):
    for code in {oracle.FORMATS[fmt].max_code + 1, 255}:
        for at in ((0, 0), (2, 40), (1, 7)):
            codes = np.zeros((3, 41), np.uint8)
            codes[at] = code
            with pytest.raises(ValueError, match=str(code)):
                _core.pack(codes, fmt)


def test_padding_is_checked_bit_by_bit(fmt):
    f = oracle.FORMATS[fmt]
    n, k = 17, f.depth + f.depth // 2 + 1
    packed = _core.pack(np.zeros((n, k), np.uint8), fmt)
    inside = oracle.pack(np.full((n, k), f.max_code, np.uint8), fmt)
    for panel, step, byte in np.ndindex(packed.shape):
        for bit in range(8):
            changed = packed.copy()
            changed[panel, step, byte] = 1 << bit
            is_code = bool(inside[panel, step, byte] & (1 << bit))
            assert _core.padding_is_zero(changed, fmt, n, k) == is_code, (panel, step, byte, bit)


def test_tap_channels(fmt):
    for channels in range(1, 140):
        assert _core.tap_channels(fmt, channels) == oracle.tap_channels(fmt, channels)


@pytest.mark.parametrize(("n", "k"), [(0, 5), (0, 0), (3, 0)])
def test_nothing_to_pack(fmt, n, k):
    packed = _core.pack(np.zeros((n, k), np.uint8), fmt)
    assert packed.shape == oracle.packed_shape(fmt, n, k)
    assert _core.unpack(packed, fmt, n, k).shape == (n, k)


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.float32, bool])
def test_other_types_are_refused(dtype):
    with pytest.raises((TypeError, ValueError)):
        _core.pack(np.ones((4, 8), dtype), "int8")


STRIDED = {
    "transposed": lambda codes: codes.T,
    "every-other": lambda codes: codes[::2, ::3],
    "reversed": lambda codes: codes[::-1],
    "columns": lambda codes: codes[:, 1:],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED)
def test_strided_codes_are_refused(view):
    """Only C order is taken: a copy is the caller's to make."""
    codes = view(np.ones((60, 80), np.uint8))
    assert not codes.flags.c_contiguous
    with pytest.raises(TypeError, match="uint8"):
        _core.pack(codes, "int8")
    assert _core.pack(np.ascontiguousarray(codes), "int8").any()


@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 8)])
def test_other_shapes_are_refused(shape):
    with pytest.raises((TypeError, ValueError)):
        _core.pack(np.zeros(shape, np.uint8), "int8")


@pytest.mark.parametrize(
    "shape", [(2, 3, 64), (3, 2, 64), (1, 3, 64), (3, 3, 32), (3, 3, 65), (3, 64), (576,)]
)
def test_packed_of_another_shape_is_refused(shape):
    packed = np.zeros(shape, np.uint8)
    for function in (_core.unpack, _core.padding_is_zero):
        function(np.zeros((3, 3, 64), np.uint8), "int8", 40, 12)
        with pytest.raises((TypeError, ValueError)):
            function(packed, "int8", 40, 12)


@pytest.mark.parametrize(("n", "k"), [(-1, 12), (40, -1), (49, 12), (32, 12), (40, 13), (40, 8)])
def test_sizes_that_do_not_match_are_refused(n, k):
    packed = np.zeros((3, 3, 64), np.uint8)
    for function in (_core.unpack, _core.padding_is_zero):
        with pytest.raises(ValueError, match="negative" if min(n, k) < 0 else f"{n} x {k}"):
            function(packed, "int8", n, k)


def test_unknown_format_names_the_known_ones():
    codes = np.zeros((1, 1), np.uint8)
    calls = [
        lambda: _core.pack(codes, "int3"),
        lambda: _core.unpack(np.zeros((1, 1, 64), np.uint8), "int3", 1, 1),
        lambda: _core.padding_is_zero(np.zeros((1, 1, 64), np.uint8), "int3", 1, 1),
        lambda: _core.tap_channels("int3", 1),
        lambda: _core.kernel_name("int3", "int8"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"int3.*ternary"):
            call()


@given(st.integers(0, 70), st.integers(0, 5), st.integers(1, 3))
def test_scales_of_groups_in_panels(rows, groups, blocks):
    """Against the oracle, and back; what pads the last panel of a block is 0."""
    values = np.arange(1, blocks * rows * groups + 1).astype(np.int16)
    values = values.view(np.float16).reshape(blocks * rows, groups)
    packed = pack_groups(torch.from_numpy(values), blocks)
    assert packed.shape == (blocks * -(-rows // 16), groups, 16)
    if values.size:
        expected = oracle.pack_groups(values, blocks)
        np.testing.assert_array_equal(packed.numpy().view(np.int16), expected.view(np.int16))
    assert unpack_groups(packed, blocks, rows).numpy().tobytes() == values.tobytes()
    assert groups_padding_is_zero(packed, blocks, rows)
    if rows % 16 and groups:
        packed[-1, -1, -1] = -0.0
        assert not groups_padding_is_zero(packed, blocks, rows)


def test_a_scale_of_a_group_by_hand():
    values = np.zeros((40, 3), np.float16)
    values[21, 2] = 5
    packed = pack_groups(torch.from_numpy(values), 1)
    assert packed.shape == (3, 3, 16)
    assert packed.nonzero().tolist() == [[1, 2, 5]]
