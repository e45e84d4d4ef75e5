"""A static network as a module: state, copies, inputs of every kind, what it refuses."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from static.test_patterns import converted, eagerly
from torch import nn

import lowbit
from lowbit.static import Network, PreparedNetwork
from lowbit.static.capture import NotCaptured, capture


class Net(nn.Module):
    """A small residual network with an island in float."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.SiLU())
        self.mix = nn.Conv2d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(8))
        self.tokens = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.mix(self.body(x))
        x = self.tokens(x.mean((2, 3))) * self.scale
        return self.head(x)


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 16)


@pytest.fixture
def network(images):
    model = Net()
    model.norm.running_mean.normal_()
    return converted(model, images)


def test_state_and_names(network):
    state = network.state_dict()
    assert {"stem.weight_packed", "body.0.bias", "tokens.weight", "scale"} <= set(state)
    assert state["value_scale"].dtype == torch.float32
    assert state["value_zero"].dtype == torch.int32
    assert not network.training
    assert "programs=2" in repr(network)


def test_account_and_summary(network):
    rows = {row.name: row for row in network.account.rows}
    assert rows["stem"].where == rows["relu"].where == "integers"
    assert "stem" in rows["relu"].note
    assert rows["body.1"].operation == "conv, silu"
    assert rows["tokens"].where == "float"
    assert "2 in float" not in str(network.account).splitlines()[0]
    kept = {row.name: row for row in lowbit.summary(network).rows}
    assert kept["stem"].scheme == "w8a8-static"
    assert "norm" in kept["stem"].note
    assert "'relu'" in kept["stem"].note
    assert kept["stem"].bytes_before > kept["stem"].bytes_after


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same(how, network, images):
    wanted = network(images)
    if how == "deepcopy":
        twin = copy.deepcopy(network)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(network))
    else:
        buffer = io.BytesIO()
        torch.save(network, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(images), wanted)
    twin.value_scale.mul_(2)
    assert torch.equal(network(images), wanted)


def test_state_dict_of_another_calibration(images):
    torch.manual_seed(1)
    model = Net()
    one, two = converted(model, images), converted(model, 3 * images)
    before, wanted = one(images), two(images)
    assert not torch.equal(before, wanted)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(images), wanted)


def test_batches_sizes_and_memory_formats(network, images):
    wanted = network(images)
    assert torch.equal(network(images[1:]), wanted[1:])
    assert network(images[:0]).shape == (0, 5)
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(network(last), wanted)
    assert torch.equal(network(images.flip(3).flip(3)[:, :, :, :]), wanted)
    assert torch.equal(network(images.transpose(2, 3).contiguous().transpose(2, 3)), wanted)
    other = torch.randn(3, 3, 21, 9)
    assert torch.equal(network(other), eagerly(network, other))
    assert torch.equal(network(images), wanted)


def test_memory_format_of_the_output(images):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    network = converted(model, images)
    y = network(images)
    assert y.is_contiguous()
    z = network(images.to(memory_format=torch.channels_last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, z)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads, network, images, use_threads):
    wanted = eagerly(network, images)
    use_threads(threads)
    assert torch.equal(network(images), wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite(value, network, images):
    wanted = network(images)
    images[0, 1, 2, 3] = value
    for y in (network(images), eagerly(network, images)):
        assert y[0].isnan().all()
        assert torch.equal(y[1], wanted[1])


def test_outputs_have_the_dtype_of_inputs(images):
    model = Net().eval()
    for dtype in (torch.bfloat16, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        network = converted(twin, images.to(dtype))
        assert network(images.to(dtype)).dtype == dtype
        assert network(images).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_changes_no_parameter(dtype, images):
    network = converted(Net().eval(), images)
    before = {key: x.clone() for key, x in network.state_dict().items()}
    wanted = network(images.to(dtype).float())
    moved = copy.deepcopy(network).to(dtype)
    for key, x in moved.state_dict().items():
        assert x.dtype == before[key].dtype
        assert torch.equal(x, before[key])
    for either in (network, moved):
        assert torch.equal(either(images.to(dtype)), wanted.to(dtype))


def test_a_layer_that_is_called_again_counts_once(images):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.body = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.body(self.body(self.body(self.stem(x))))

    model = Again().eval()
    float_bytes = sum(p.nbytes for p in model.parameters())
    rows = lowbit.summary(converted(model, images)).rows
    assert sum(entry.bytes_before for entry in rows) == float_bytes


def test_inputs_that_do_not_fit(network, images):
    with pytest.raises(ValueError, match=r"'stem'.*3 channels, not 4"):
        network(torch.randn(2, 4, 12, 16))
    with pytest.raises(ValueError, match=r"had \[4\]"):
        network(torch.randn(3, 12, 16))
    with pytest.raises(TypeError, match=r"\(x\)"):
        network(images, images)
    with pytest.raises(TypeError, match="list"):
        network(images.tolist())
    with pytest.raises(RuntimeError, match="meta"):
        network(images.to("meta"))
    deep = converted(nn.Sequential(nn.Conv2d(3, 4, 7), nn.Conv2d(4, 4, 5)), images)
    with pytest.raises(ValueError, match=r"'1'.*smaller"):
        deep(torch.randn(1, 3, 8, 10))


def test_gradients_are_not_computed(network, images):
    y = network(images.requires_grad_())
    assert not y.requires_grad


def test_a_weight_that_is_replaced_is_seen(network, images):
    before = network(images)
    network.mix.weight_scale = network.mix.weight_scale * 2
    assert not torch.equal(network(images), before)
    assert torch.equal(network(images), eagerly(network, images))


def test_preparing_again_and_converting_twice(images):
    model = Net()
    prepared = lowbit.prepare(model.eval(), "w8a8-static", images)
    assert isinstance(prepared, PreparedNetwork)
    assert torch.allclose(prepared(images), model(images), atol=1e-5)
    with pytest.raises(ValueError, match="calibrated"):
        lowbit.convert(lowbit.prepare(model, "w8a8-static", images))
    with pytest.raises(ValueError, match="prepared already"):
        lowbit.prepare(prepared, "w8a8-static", images)
    one = lowbit.convert(lowbit.calibrate(prepared, [images]))
    two = lowbit.convert(prepared)
    assert torch.equal(one(images), two(images))
    three = lowbit.convert(lowbit.calibrate(prepared, [9 * images]))
    assert not torch.equal(one(images), three(images))
    twin = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(lowbit.convert(twin)(images), three(images))


def test_calibration_data_with_nan_names_the_value(images):
    prepared = lowbit.prepare(Net().eval(), "w8a8-static", images)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'x'.*NaN"):
        lowbit.calibrate(prepared, [images])


class Branching(Net):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_what_cannot_be_captured_runs_layer_by_layer(images):
    prepared = lowbit.prepare(Branching().eval(), "w8a8-static", images)
    assert not isinstance(prepared, PreparedNetwork)
    model = lowbit.convert(lowbit.calibrate(prepared, [images]))
    (note,) = {row.note for row in lowbit.summary(model).rows if row.name == "mix"}
    assert "layer by layer" in note
    assert "torch.fx cannot trace it" in note


def test_reasons_for_not_capturing(images):

    with pytest.raises(NotCaptured, match="do not fit"):
        capture(Net(), (images, images), {})
    with pytest.raises(NotCaptured, match="float, not a tensor"):
        capture(Net(), 1.0, {})
    with pytest.raises(NotCaptured, match="does not run"):
        capture(Net(), images[:, :2], {})
    with pytest.raises(NotCaptured, match="single layer"):
        capture(nn.Conv2d(3, 3, 1), images, {})


def test_no_example_inputs_and_no_graph(images):
    for options in ({}, {"example_inputs": images, "graph": False}):
        prepared = lowbit.prepare(Net().eval(), "w8a8-static", **options)
        assert not isinstance(prepared, PreparedNetwork)
        assert not isinstance(lowbit.convert(lowbit.calibrate(prepared, [images])), Network)


def test_hooks_and_attributes_of_layers(images):
    model, calls = Net(), []
    model.mix.mine = 7
    model.head.register_forward_hook(lambda *_: calls.append(1))
    network = converted(model, images)
    assert network.mix.mine == 7
    assert [row.name for row in network.account.in_float][-1] == "head"
    calls.clear()
    network(images)
    assert calls == [1]
    model.body.register_forward_pre_hook(lambda *_: None)
    prepared = lowbit.prepare(model.eval(), "w8a8-static", images)
    assert not isinstance(prepared, PreparedNetwork)


# --- Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["float", "meta", "network"])
def test_files(into, network, images, tmp_path):
    path = tmp_path / "network.safetensors"
    lowbit.save_file(network, path)
    model = Net()
    if into == "meta":
        model = model.to("meta")
    elif into == "network":
        model = converted(model, 2 * images)
    loaded = lowbit.load_file(model, path)
    assert isinstance(loaded, Network)
    assert torch.equal(loaded(images), network(images))
    assert str(lowbit.summary(loaded)) == str(lowbit.summary(network))
    assert str(loaded.account) == str(network.account)
    other = tmp_path / "again.safetensors"
    lowbit.save_file(loaded, other)
    assert torch.equal(lowbit.load_file(Net(), other)(images), network(images))


def test_files_of_every_kind_of_layer(images, tmp_path):
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 0, 1)),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(384, 5),
    )
    overrides = {"3": "w4a16-static", "7": "w2a8-g32-static"}
    network = converted(model, images, overrides=overrides)
    path = tmp_path / "network.safetensors"
    lowbit.save_file(network, path)
    loaded = lowbit.load_file(copy.deepcopy(model), path)
    assert torch.equal(loaded(images), network(images))


def test_files_of_another_model(network, images, tmp_path):
    path = tmp_path / "network.safetensors"
    lowbit.save_file(network, path)
    for model in (Branching(), nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d(3, 8, 3)):
        with pytest.raises(lowbit.FileFormatError):
            lowbit.load_file(model, path)


# --- Weights that learn from the data ------------------------------------------------------------


class Flat(nn.Module):
    """A convolution and a layer of its flattened output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.fc = nn.Linear(8 * 48, 5)

    def forward(self, x):
        return self.fc(F.relu(self.stem(x)).flatten(1))


@pytest.mark.parametrize("scheme", ["w4a8-static-gptq", "w4a8-g32-static-gptq"])
@pytest.mark.parametrize("make", [Net, Flat])
def test_weights_that_learn_from_the_data(make, scheme, images):
    torch.manual_seed(0)
    model = make().eval()
    data = [torch.randn_like(images) for _ in range(8)]
    learned = lowbit.quantize(model, scheme, calibration=data)
    plain = lowbit.quantize(model, scheme.removesuffix("-gptq"), calibration=data)
    assert isinstance(learned, Network)
    assert not torch.equal(learned.stem.weight_packed, plain.stem.weight_packed)
    x = torch.randn(32, *images.shape[1:])
    wanted = model(x)
    assert "w4a8" in lowbit.summary(learned).converted[0].scheme
    assert (learned(x) - wanted).norm() < 1.2 * (plain(x) - wanted).norm()
    assert torch.equal(learned(x), eagerly(learned, x))


def test_biases_that_learn_from_the_data(images):
    model = Net().eval()
    found = lowbit.quantize(model, "w2a8-static", calibration=[images], correct_bias=True)
    plain = lowbit.quantize(model, "w2a8-static", calibration=[images])
    assert isinstance(found, Network)
    assert not torch.equal(found.mix.bias, plain.mix.bias)


def test_layers_that_torch_fx_does_not_see():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), encoder).eval()
    tokens = torch.randn(2, 5, 16)
    prepared = lowbit.prepare(model, "w8a8-static", tokens)
    assert not isinstance(prepared, PreparedNetwork)
    found = lowbit.convert(lowbit.calibrate(prepared, [tokens]))
    rows = {row.name: row for row in lowbit.summary(found).rows}
    assert rows["1.linear1"].converted
    assert "does not look into '1', a TransformerEncoderLayer" in rows["0"].note


def test_a_compiled_function_calls_it(network, images):
    compiled = torch.compile(lambda x: network(x + 1) * 2, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images), network(images + 1) * 2)
        assert torch.equal(torch.compile(network, backend="eager")(images), network(images))


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_says_what_to_do(strict, network, images):
    with pytest.raises(RuntimeError, match="graph=False"):
        torch.export.export(network, (images,), strict=strict)


@pytest.mark.filterwarnings("ignore")  # of the tracer, before it gets there
def test_tracing_and_transforms_say_what_to_do(network, images):
    with pytest.raises(RuntimeError, match=r"jit\.trace.*graph=False"):
        torch.jit.trace(network, images)
    with pytest.raises(RuntimeError, match=r"torch\.func.*graph=False"):
        torch.func.vmap(network)(images[None])
    with pytest.raises(RuntimeError, match=r"torch\.func.*graph=False"):
        torch.func.grad(lambda x: network(x).sum())(images)


def test_torch_export_of_what_runs_layer_by_layer(images):
    prepared = lowbit.prepare(Net().eval(), "w8a8-static", images, graph=False)
    model = lowbit.convert(lowbit.calibrate(prepared, [images]))
    program = torch.export.export(model, (images,))
    assert torch.equal(program.module()(images), model(images))


def test_layers_that_are_never_called(images):
    class Training(Net):
        def __init__(self):
            super().__init__()
            self.auxiliary = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
            self.dead = nn.LayerNorm(3)

        def forward(self, x):
            y = super().forward(x)
            return (y, self.auxiliary(x)) if self.training else y

    network = converted(Training(), images)
    rows = {row.name: row for row in network.account.left_out}
    assert set(rows) == {"auxiliary.0", "auxiliary.1", "dead"}
    assert (rows["dead"].operation, rows["dead"].where) == ("LayerNorm", "nowhere")
    assert all("never called" in row.note for row in rows.values())
    assert str(network.account).endswith("3 left out")
    assert not converted(Net(), images).account.left_out
    assert str(pickle.loads(pickle.dumps(network)).account) == str(network.account)


def test_importing_lowbit_leaves_the_compiler_out():
    code = "import sys, torch, lowbit; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
