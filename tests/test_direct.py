"""Prepared calls: what they answer, with which bits, and what they decline."""

import subprocess
import sys

import expected
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lowbit import _core, direct
from lowbit.nn import Conv2d, Linear
from lowbit.packed import NAMES

if not direct._bound:
    pytest.skip("this torch has no exchange table", allow_module_level=True)


def linear_layer(scheme="w4a8-g32", **options):
    return Linear.from_float(nn.Linear(70, 33, **options).eval(), scheme).eval()


def conv_layer(scheme="w4a8-g32", **options):
    return Conv2d.from_float(nn.Conv2d(6, 10, 3, **options).eval(), scheme).eval()


def linear_and_input():
    return linear_layer(), torch.randn(3, 70)


def conv_and_input():
    return conv_layer(padding=1), torch.randn(2, 6, 7, 5)


@pytest.fixture(params=[linear_and_input, conv_and_input], ids=["linear", "conv"])
def layer_and_input(request):
    return request.param()


def answer(layer, x):
    """What the layer's prepared call says; the layer has been called before."""
    return layer._direct(x, layer.__dict__)


def oracle_of(layer, x):
    return (expected.linear if isinstance(layer, Linear) else expected.conv2d)(layer, x)


# --- what it answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", expected.SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_oracles_bits(scheme, bias, isa):
    layer = linear_layer(scheme, bias=bias)
    layer(torch.zeros(1, 70))
    for shape in ((70,), (1, 70), (7, 70), (2, 3, 70), (2, 1, 2, 1, 70)):
        x = torch.randn(shape)
        y = answer(layer, x)
        assert type(y) is torch.Tensor
        assert y.is_contiguous()
        assert expected.same_bits(y, oracle_of(layer, x))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w1a1"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1},
        {"padding": (2, 0), "stride": (1, 2)},
        {"padding": "same", "dilation": 2},
        {"groups": 2, "stride": 2, "bias": False},
        {"padding": "valid"},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_conv2d_has_the_oracles_bits(scheme, options, memory_format):
    layer = conv_layer(scheme, **options)
    x = torch.randn(2, 6, 7, 8).to(memory_format=memory_format)
    want = layer(x)
    y = answer(layer, x)
    assert expected.same_bits(y, want)
    assert y.stride() == want.stride()
    assert expected.same_bits(want, oracle_of(layer, x))


@pytest.mark.parametrize(("name", "x"), [pytest.param(n, x, id=n) for n, x in expected.images()])
@pytest.mark.parametrize("out_channels", [1, 4])
def test_conv2d_memory_format_is_what_torch_gives(name, x, out_channels):
    conv = nn.Conv2d(x.shape[1], out_channels, 3, padding=1).eval()
    layer = Conv2d.from_float(conv, "w8a8")
    with torch.no_grad():
        want, first = conv(x), layer(x)
    y = answer(layer, x)
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    assert (y is not None) == (dense and x.numel() > 0)
    if y is not None:
        assert expected.same_bits(y, first)
        assert y.stride() == want.stride()


def test_plain_inputs_of_every_origin():
    layer, x = linear_and_input()
    want = layer(x)
    with torch.inference_mode():
        made_in_inference = x.clone()
        assert expected.same_bits(answer(layer, made_in_inference), want)
    for same in (
        nn.Parameter(x),
        nn.Parameter(x, requires_grad=False),
        torch.cat([x, x])[3:],
        x.clone().requires_grad_(),
        made_in_inference,
        x.t().contiguous().t().clone(memory_format=torch.contiguous_format),
    ):
        y = answer(layer, same)
        assert expected.same_bits(y, want)
        assert not y.requires_grad
    one = x[:1].t().contiguous().t()  # a size of 1 has any stride
    assert expected.same_bits(answer(layer, one), want[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last)])
def test_dtypes(dtype, change):
    layer, x = linear_and_input()
    for view in (x, x[0], torch.cat([x, x], 1)[:, ::2]):
        given = view.to(dtype)
        want = layer(given)
        y = answer(layer, given)
        assert y.dtype == dtype
        assert expected.same_bits(y, want)
        assert expected.same_bits(y, oracle_of(layer, given))
    layer, x = conv_and_input()
    x = change(x).to(dtype)
    with torch.no_grad():
        want = nn.Conv2d(6, 10, 3, padding=1, dtype=dtype)(x)
    layer(x)
    y = answer(layer, x)
    assert expected.same_bits(y, oracle_of(layer, x))
    assert y.stride() == want.stride()
    wanting = x.clone().requires_grad_()
    assert not answer(layer, wanting).requires_grad


def test_threads_and_default_dtype_and_released_gil(use_threads):
    layer = Linear.from_float(nn.Linear(1024, 512).eval(), "w8a8")
    x = torch.randn(64, 1024)
    want = layer(x)
    torch.set_default_dtype(torch.float64)
    try:
        for threads in (1, 2, 3):
            use_threads(threads)
            assert expected.same_bits(answer(layer, x), want)
    finally:
        torch.set_default_dtype(torch.float32)


# --- what it declines ----------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


def without_memory(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: None,
        lambda x: 3.0,
        lambda x: x.numpy(),
        lambda x: x.int(),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.to(torch.complex64),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.to_mkldnn(),
        lambda x: torch.nested.nested_tensor([x, x[:1]]),
        lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
        lambda x: x.as_subclass(Subclass),
        lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
        lambda x: torch.complex(torch.zeros_like(x), -x).to(torch.complex128).conj().imag,
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x[:0],
        lambda x: x[..., :-1],
        lambda x: x[:, 1:],
        lambda x: x.transpose(0, 1),
        lambda x: x.expand(2, *x.shape)[..., 0],
        lambda x: x[..., 0, 0],
        lambda x: x.new_zeros([1] * 9 + [70]),
        without_memory,
    ],
)
def test_inputs_for_the_layers_own_code(layer_and_input, change):
    layer, x = layer_and_input
    layer(x)
    assert answer(layer, x) is not None
    assert answer(layer, change(x)) is None


def test_an_image_without_a_batch_is_for_the_layers_own_code():
    layer, x = conv_and_input()
    want = layer(x)
    assert answer(layer, x[0]) is None
    assert expected.same_bits(layer(x[0]), want[0])
    assert answer(layer, x[..., :2, :0]) is None


def test_an_input_that_wants_gradients_while_training(layer_and_input):
    layer, x = layer_and_input
    want = layer(x).clone()
    layer.train()
    assert expected.same_bits(answer(layer, x), want)
    x.requires_grad_()
    assert answer(layer, x) is None
    with pytest.raises(RuntimeError, match="for inference only"):
        layer(x)
    layer.eval()
    assert expected.same_bits(answer(layer, x), want)


@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.device("cpu"),
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: FlopCounterMode(display=False),
        lambda: torch.profiler.profile(),
        lambda: torch.overrides.BaseTorchFunctionMode(),
    ],
)
def test_what_must_see_the_operator_sees_it(layer_and_input, context):
    layer, x = layer_and_input
    layer(x)
    with context():
        assert answer(layer, x) is None
    assert answer(layer, x) is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_functorch_and_tracing(layer_and_input):
    layer, x = layer_and_input
    layer(x)
    seen = []

    def record(row):
        seen.append(answer(layer, x))
        return row

    torch.vmap(record)(torch.ones(2))
    torch.func.grad(lambda v: record(v).sum())(torch.ones(2))
    torch.func.functionalize(record)(torch.ones(2))
    torch.jit.trace(record, torch.ones(2), check_trace=False)
    assert seen == [None] * 4


def test_layers_without_a_prepared_call():
    for layer, x in (
        (Linear(0, 5), torch.zeros(2, 0)),
        (Linear(5, 0), torch.zeros(2, 5)),
        (conv_layer(padding=1, padding_mode="reflect"), torch.randn(1, 6, 7, 5)),
    ):
        layer(x)
        assert layer._direct is None
    layer, x = conv_and_input()
    layer.stride = [1, 1]  # could change in place
    assert layer(x).shape == (2, 10, 7, 5)
    assert layer._direct is None
    layer.stride[0] = 2
    assert layer(x).shape == (2, 10, 4, 5)
    layer.dilation = (1 << 40, 1)
    with pytest.raises(ValueError, match="smaller than the kernel"):
        layer(x)


# --- the object ----------------------------------------------------------------------------------


def test_wrong_use_is_an_error(layer_and_input):
    layer, x = layer_and_input
    layer(x)
    call = layer._direct
    for arguments in ((), (x,), (x, None), (x, layer), (x, layer.__dict__, 1)):
        with pytest.raises(TypeError, match="__dict__"):
            call(*arguments)
    with pytest.raises(TypeError, match="__dict__"):
        call(x, attributes=layer.__dict__)
    with pytest.raises(TypeError, match="__dict__"):
        call.matches(layer)
    with pytest.raises(TypeError, match="create"):
        type(call)()
    assert call(x, {}) is None
    assert call(x, {"_buffers": None}) is None
    assert call(x, {"_buffers": {}}) is None


def test_only_the_operands_that_were_checked():
    layer, x = linear_and_input()
    w = layer._check_operands(tuple(layer._buffers[name] for name in NAMES))
    other = (w.tensors[0].clone(), *w.tensors[1:])
    for tensors in (other, w.tensors[:3], (x.numpy(), *w.tensors[1:])):
        with pytest.raises(ValueError, match=r"tensors of a layer|at the address"):
            _core.direct_linear(tensors, {}, *w.operands)
    assert _core.direct_linear(w.tensors, {}, *w.operands).matches(layer.__dict__)


@pytest.mark.parametrize(
    ("tensor_type", "questions"),
    [(int, ()), (type("Other", (), {"__dlpack_c_exchange_api__": None}), ())],
)
def test_a_torch_without_an_exchange_table(tensor_type, questions):
    bind = (tensor_type, tensor_type, torch.float32, torch.get_num_threads, questions)
    assert not _core.bind_torch(*bind)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_no_memory_is_a_memory_error():
    code = """
import resource, torch
from torch import nn
from lowbit.nn import Linear
layer, x = Linear(1 << 20, 16), torch.ones(32, 1 << 20)
layer(x[:1])
assert layer._direct is not None
torch.set_num_threads(2)
status = open("/proc/self/statm").read().split()
used = int(status[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), -1))
for call in (lambda: layer._direct(x, layer.__dict__), lambda: layer(x)):
    try:
        call()
    except MemoryError:
        print("MemoryError")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["MemoryError", "MemoryError"]
