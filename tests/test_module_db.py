"""torch's own samples of the layers that convert, given to the converted layer.

It must accept what the float layer accepts, return the same shape, dtype and memory format and
nearly the same values, and raise where the float layer raises.
"""

import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn

import lowbit

DTYPES = {str(d): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
SCHEMES = ("w8a8", "w8a16", "w4a8", "w1a1")

# Signal to noise in dB that samples as small as these reach; None where nothing is promised.
LEAST_SQNR = {"w8a8": 30, "w8a16": 35, "w4a8": None, "w1a1": None}

# torch's test modules change settings of torch and of hypothesis when they are imported: that must
# not reach the other tests, so a process of its own reads them.
READ_SAMPLES = """
import sys, torch
from torch import nn
from torch.testing._internal.common_modules import module_db
found = []
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for info in module_db:
        if info.module_cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d):
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=dtype, requires_grad=False, training=False
            )
            for i, sample in enumerate(inputs):
                make, forward = sample.constructor_input, sample.forward_input
                name = f"{info.module_cls.__name__}-{i}-{sample.desc or 'plain'}"
                found.append((str(dtype), name, info.module_cls.__name__,
                              make.args, make.kwargs, forward.args, forward.kwargs))
torch.save(found, sys.argv[1])
"""


def read_samples(path: str) -> list:
    pytest.importorskip("expecttest")  # torch's test modules need it
    command = [sys.executable, "-c", READ_SAMPLES, path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="session")
def samples(tmp_path_factory):
    """A function: the name, float module in eval mode, args and kwargs of a dtype's samples."""
    read = read_samples(str(tmp_path_factory.mktemp("module_db") / "samples.pt"))

    def of(dtype: str) -> list:
        return [
            (name, getattr(nn, cls)(*args, **kwargs, dtype=DTYPES[dtype]).eval(), *forward)
            for sample_dtype, name, cls, args, kwargs, *forward in read
            if sample_dtype == dtype
        ]

    return of


def memory_formats(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values with different strides."""
    formats = {"contiguous": tensor.contiguous()}
    if tensor.dim() >= 2:
        formats["transposed"] = tensor.mT.contiguous().mT
    if tensor.dim() == 4:
        formats["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    return formats


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Signal to quantization noise ratio in dB."""
    expected, actual = expected.detach().double(), actual.detach().double()
    return float(20 * torch.log10(expected.norm() / (expected - actual).norm()))


def test_samples_are_there(samples):
    names = [name for name, *_ in samples("torch.float32")]
    assert sum(name.startswith("Linear") for name in names) >= 3
    for kind, least in {"Conv1d": 4, "Conv2d": 4, "ConvTranspose2d": 2}.items():
        assert sum(name.startswith(f"{kind}-") for name in names) >= least


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_samples_give_what_the_float_layer_gives(samples, scheme, dtype):
    for name, module, args, kwargs in samples(dtype):
        layer = lowbit.quantize(nn.Sequential(module), scheme)[0]
        assert type(layer) is getattr(lowbit.nn, type(module).__name__), name
        tensor = args[0] if args else kwargs["input"]
        for label, x in memory_formats(tensor).items():
            if args:
                expected, actual = module(x), layer(x)
            else:
                expected, actual = module(input=x), layer(input=x)
            case = f"{name}, {label}"
            assert actual.shape == expected.shape, case
            assert actual.dtype == expected.dtype, case
            assert actual.stride() == expected.stride(), case
            assert not actual.requires_grad, case
            if LEAST_SQNR[scheme] is not None:
                assert sqnr(expected, actual) > LEAST_SQNR[scheme], case


@pytest.mark.parametrize("cls", lowbit.nn.LAYERS, ids=lambda cls: cls.__name__)
def test_forward_takes_its_input_by_the_same_name(cls):
    ours = inspect.signature(getattr(lowbit.nn, cls.__name__).forward).parameters
    assert list(ours) == list(inspect.signature(cls.forward).parameters)


BAD_INPUTS = {
    "Linear": {
        "features": torch.zeros(4, 11),
        "scalar": torch.tensor(1.0),
        "no-features": torch.zeros(4, 0),
        "integers": torch.zeros(4, 10, dtype=torch.int64),
        "bools": torch.zeros(4, 10, dtype=torch.bool),
        "complex": torch.zeros(4, 10, dtype=torch.complex64),
        "list": [[0.0] * 10],
        "none": None,
    },
    "Conv2d": {
        "channels": torch.zeros(2, 5, 6, 6),
        "channels-unbatched": torch.zeros(5, 6, 6),
        "vector": torch.zeros(4),
        "matrix": torch.zeros(4, 6),
        "five-dimensional": torch.zeros(1, 2, 4, 6, 6),
        "smaller-than-the-kernel": torch.zeros(2, 4, 2, 2),
        "no-pixels": torch.zeros(2, 4, 0, 6),
        "integers": torch.zeros(2, 4, 6, 6, dtype=torch.int32),
        "complex": torch.zeros(2, 4, 6, 6, dtype=torch.complex64),
        "list": [0.0],
        "none": None,
    },
    "Conv1d": {
        "channels": torch.zeros(2, 5, 6),
        "channels-unbatched": torch.zeros(5, 6),
        "vector": torch.zeros(4),
        "four-dimensional": torch.zeros(1, 2, 4, 6),
        "smaller-than-the-kernel": torch.zeros(2, 4, 2),
        "no-samples": torch.zeros(2, 4, 0),
        "integers": torch.zeros(2, 4, 6, dtype=torch.int32),
        "list": [0.0],
        "none": None,
    },
    "ConvTranspose2d": {
        "channels": torch.zeros(2, 5, 6, 6),
        "channels-unbatched": torch.zeros(5, 6, 6),
        "matrix": torch.zeros(4, 6),
        "five-dimensional": torch.zeros(1, 2, 4, 6, 6),
        "no-pixels": torch.zeros(2, 4, 0, 6),
        "integers": torch.zeros(2, 4, 6, 6, dtype=torch.int32),
        "list": [0.0],
        "none": None,
    },
}
ACCEPTED_SIZES = {
    "Linear": [(0, 10), (3, 0, 10), (10,), (1, 1, 1, 1, 10)],
    "Conv2d": [(0, 4, 6, 6), (4, 6, 6), (1, 4, 3, 3), (2, 4, 3, 9)],
    "Conv1d": [(0, 4, 6), (4, 6), (1, 4, 3), (2, 4, 9)],
    "ConvTranspose2d": [(0, 4, 6, 6), (4, 6, 6), (1, 4, 1, 1), (2, 4, 3, 9)],
}


def example(kind: str) -> nn.Module:
    return (nn.Linear(10, 8) if kind == "Linear" else getattr(nn, kind)(4, 5, 3)).eval()


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, inputs in BAD_INPUTS.items() for name in inputs]
)
def test_raises_where_the_float_layer_raises(kind, name):
    module, x = example(kind), BAD_INPUTS[kind][name]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        module(x)
    layer = lowbit.quantize(nn.Sequential(module), "w8a8")[0]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=r"lowbit\.nn\.\w+ '0'"):
        layer(x)


@pytest.mark.parametrize(
    ("kind", "size"), [(kind, size) for kind, sizes in ACCEPTED_SIZES.items() for size in sizes]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_accepts_the_sizes_that_the_float_layer_accepts(kind, size, scheme):
    module, x = example(kind), torch.randn(size)
    layer = lowbit.quantize(nn.Sequential(module), scheme)[0]
    expected, actual = module(x), layer(x)
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride()
