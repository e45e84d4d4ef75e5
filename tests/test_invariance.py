"""The same bits: a layer's output depends on its input row (its image) and its weights alone.

Not on the instruction set, the number of threads, the other rows of the batch, the memory format
or the run. Through `lowbit.nn`, as users call it.
"""

from functools import cache

import pytest
import torch
from torch import nn

import lowbit
from lowbit import _core

SCHEMES = ("w8a8", "w4a8", "w2a8", "wta8", "w1a8", "w1a1", "w8a16", "w4a8-g32", "w2a16-g64")
BEST = next(isa["name"] for isa in _core.isas() if isa["usable"])

# Large enough for several tiles and for every thread to get work, ragged in every dimension.
LINEARS = {"square": (128, 128), "ragged": (77, 201), "narrow": (300, 3)}
CONVS = {
    "dense": nn.Conv2d(40, 37, 3, padding=1),
    "first": nn.Conv2d(3, 24, 3, stride=2, padding=1),
    "pointwise": nn.Conv2d(50, 70, 1),
    "depthwise": nn.Conv2d(72, 72, 3, padding=1, groups=72),
    "grouped": nn.Conv2d(36, 24, 3, padding=1, groups=3),
    "reflect": nn.Conv2d(8, 9, 3, padding=1, padding_mode="reflect"),
    "same": nn.Conv2d(33, 20, (4, 3), padding="same"),
}
LAYERS = [f"linear-{name}" for name in LINEARS] + [f"conv-{name}" for name in CONVS]

every_layer = pytest.mark.parametrize("name", LAYERS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@cache
def example(name: str, scheme: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A layer, a batch, and the output on the best instruction set with one thread."""
    generator = torch.Generator().manual_seed(len(name))
    kind, _, which = name.partition("-")
    if kind == "linear":
        float_layer = nn.Linear(*LINEARS[which])
        x = torch.randn(23, LINEARS[which][0], generator=generator)
    else:
        float_layer = CONVS[which]
        x = torch.randn(3, float_layer.in_channels, 11, 10, generator=generator)
    # Rows and images of different magnitude: each has its own scale.
    x *= torch.logspace(-3, 3, len(x)).view(-1, *[1] * (x.dim() - 1))
    layer = lowbit.quantize(nn.Sequential(float_layer), scheme)[0]
    assert isinstance(layer, (lowbit.nn.Linear, lowbit.nn.Conv2d))
    isa, threads = _core.isa(), torch.get_num_threads()
    _core.set_isa(BEST)
    torch.set_num_threads(1)
    y = layer(x)
    torch.set_num_threads(threads)
    _core.set_isa(isa)
    assert y.isfinite().all()
    return layer, x, y


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


@every_layer
@every_scheme
def test_every_isa(name, scheme, isa):
    layer, x, y = example(name, scheme)
    assert same_bits(layer(x), y)


@pytest.mark.parametrize("scheme", ["w8a8", "w1a1"])
def test_outputs_that_leave_the_caches(scheme, isa):
    """Their lines are fetched early: the same bits as of parts that are small."""
    layer = lowbit.quantize(nn.Sequential(nn.Linear(33, 1040)), scheme)[0]
    x = torch.randn(2100, 33, generator=torch.Generator().manual_seed(0))
    assert same_bits(layer(x), torch.cat([layer(part) for part in x.split(700)]))
    conv = lowbit.quantize(nn.Sequential(nn.Conv2d(32, 64, (1, 2), padding=(0, 1))), scheme)[0]
    images = x.flatten()[: 6 * 32 * 18 * 19].reshape(6, 32, 18, 19).repeat(1, 1, 4, 4)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        images = images.contiguous(memory_format=memory_format)
        assert same_bits(conv(images), torch.cat([conv(image[None]) for image in images]))


@every_layer
@every_scheme
def test_every_number_of_threads(name, scheme, use_threads):
    layer, x, y = example(name, scheme)
    for threads in (1, 2, 3, 5):
        use_threads(threads)
        assert same_bits(layer(x), y)
        assert same_bits(layer(x[:1]), y[:1])


@every_layer
@every_scheme
def test_every_slice_of_the_batch(name, scheme):
    layer, x, y = example(name, scheme)
    for i in range(len(x)):
        assert same_bits(layer(x[i : i + 1]), y[i : i + 1])
        assert same_bits(layer(x[i]), y[i])
    for part in (slice(0, 2), slice(1, 8), slice(1, None), slice(None, None, 2)):
        assert same_bits(layer(x[part]), y[part])


@every_layer
@every_scheme
def test_every_neighbour(name, scheme):
    """Zeros, NaN, Inf and huge values beside a row touch no bit of it."""
    layer, x, y = example(name, scheme)
    for value in (0.0, float("nan"), float("inf"), 1e38):
        changed = x.clone()
        changed[0] = value
        changed[2:] = value
        assert same_bits(layer(changed)[1], y[1])


@pytest.mark.parametrize("which", CONVS)
@every_scheme
def test_every_memory_format(which, scheme, isa):
    layer, x, y = example(f"conv-{which}", scheme)
    wide = torch.randn(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    for same in (
        x,
        x.to(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
        wide[..., ::2],
        x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    ):
        assert torch.equal(same, x)
        assert same_bits(layer(same), y)


@pytest.mark.parametrize("which", LINEARS)
@every_scheme
def test_every_batch_shape(which, scheme):
    layer, x, y = example(f"linear-{which}", scheme)
    x, y = x[:20], y[:20]
    for shape in ((4, 5), (2, 5, 2), (20, 1), (1, 1, 20)):
        assert same_bits(layer(x.view(*shape, -1)), y.view(*shape, -1))
    assert same_bits(layer(x.t().contiguous().t()), y)
    assert same_bits(layer(torch.cat([x, x], 1)[:, : x.shape[1]]), y)


@every_layer
@every_scheme
def test_every_run(name, scheme, use_threads):
    layer, x, y = example(name, scheme)
    use_threads(2)
    for _ in range(5):
        assert same_bits(layer(x), y)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32", "w2a8", "w1a1", "w8a16"])
def test_converting_again_gives_the_same_weights(scheme, isa, use_threads):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(96, 40), nn.Linear(40, 7))
    expected = lowbit.quantize(model, scheme).state_dict()
    for threads in (1, 3):
        use_threads(threads)
        state = lowbit.quantize(model, scheme).state_dict()
        assert list(state) == list(expected)
        for key, value in state.items():
            assert torch.equal(value, expected[key]), key


# More rows and images than the drivers quantize at a time (8 MiB and 32 MiB of codes).
@pytest.mark.parametrize(
    ("float_layer", "shape"),
    [
        (nn.Linear(3, 5), (2**17 + 7, 3)),
        (nn.Conv2d(16, 2, 1, stride=8), (515, 16, 64, 64)),
        (nn.Conv2d(16, 16, 3, stride=8, groups=16), (515, 16, 64, 64)),
    ],
    ids=["linear", "conv", "depthwise"],
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_a_batch_larger_than_a_pass(float_layer, shape, scheme):
    layer = lowbit.quantize(nn.Sequential(float_layer), scheme)[0]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    y = layer(x)
    for part in (slice(0, 3), slice(255, 259), slice(511, 515), slice(len(x) - 9, None)):
        assert same_bits(layer(x[part]), y[part])
