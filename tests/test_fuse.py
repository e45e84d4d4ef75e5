"""Folding of batch norms: what is folded, what is not and why, and that the function stays."""

from __future__ import annotations

import copy
import re

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import lowbit


def trained(model):
    """Eval mode, with statistics and weights as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


class Block(nn.Module):
    """A layer and a norm, called by a forward."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


class Untraceable(nn.Module):
    """Its forward asks for values."""

    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x if x.sum() > 0 else -x


def notes(model):
    return {row.name: row.note for row in lowbit.summary(model).rows if row.kind[:5] == "Batch"}


def assert_same(fused, model, x, tolerance=1e-5):
    with torch.no_grad():
        want, y = model(x), fused(x)
    assert y.dtype == want.dtype
    assert models.relative_error(y, want) < tolerance


PAIRS = {
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, groups=2), nn.BatchNorm1d, (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d, (2, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2, padding=1), nn.BatchNorm2d, (2, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d, (2, 8, 9, 9)),
    "reflect": (
        lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d,
        (2, 6, 9, 9),
    ),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, 2), nn.BatchNorm2d, (2, 6, 5, 5)),
    "transposed, grouped": (
        lambda: nn.ConvTranspose2d(6, 8, 3, 2, groups=2),
        nn.BatchNorm2d,
        (2, 6, 5, 5),
    ),
    "linear": (lambda: nn.Linear(6, 8), nn.BatchNorm1d, (5, 6)),
}
all_pairs = pytest.mark.parametrize("pair", PAIRS)


@all_pairs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_computes_the_same(pair, bias, affine):
    make, norm, shape = PAIRS[pair]
    model = trained(nn.Sequential(make(), norm(8, affine=affine, eps=0.01), nn.ReLU()))
    if not bias:
        model[0].bias = None
    before = models.state(model)
    x = torch.randn(shape)
    fused = lowbit.fuse(model, x)
    assert [type(m) for m in fused] == [type(model[0]), nn.Identity, nn.ReLU]
    assert_same(fused, model, x)
    assert notes(fused) == {"1": "folded into '0'"}
    models.assert_same_state(model, before)
    assert type(model[1]) is norm
    quantized = lowbit.quantize(model, "w8a16")
    assert isinstance(quantized[1], nn.Identity)
    assert_same(quantized, model, x, 0.02)
    assert torch.equal(quantized(x), lowbit.quantize(fused, "w8a16")(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 8, 8)
    same = copy.deepcopy(model).to(dtype)
    assert_same(lowbit.fuse(same, x.to(dtype)), same, x.to(dtype), 0.02)
    if dtype != torch.float64:  # statistics in float32, as autocast and model.half() leave them
        model[0].to(dtype)
        fused = lowbit.fuse(model)
        assert fused[0].weight.dtype == fused[0].bias.dtype == dtype
        assert_same(fused, model, x.to(dtype), 0.02)
    else:
        model[0].to(dtype)
        assert "statistics are torch.float32" in notes(lowbit.fuse(model))["1"]


# --- What is not folded --------------------------------------------------------------------------


def without_statistics():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()


def training():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].train()
    return model


def hooked(index):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[index].register_forward_hook(lambda *_: None)
    return model


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)).eval()


def subclass():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(Scaled(3, 4, 3), nn.BatchNorm2d(4)).eval()


def norm_subclass():
    class BatchNormTwice(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormTwice(4)).eval()


def tied():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)).eval()
    model[2].weight = model[0].weight
    return model


def damaged():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(-1.0)
    return model


def block(forward, **modules):
    return lambda: Block(forward, **modules).eval()


KEPT = {
    "no statistics": (without_statistics, "no running statistics"),
    "training": (training, "training mode: call model.eval"),
    "layer hook": (lambda: hooked(0), "layer before it has hooks"),
    "norm hook": (lambda: hooked(1), "it has hooks"),
    "parametrized": (parametrized, "parametrized weight"),
    "layer subclass": (subclass, "Scaled overrides the forward"),
    "norm subclass": (norm_subclass, "BatchNormTwice overrides the forward"),
    "tied": (tied, "tied to '2'"),
    "damaged": (damaged, "not be finite"),
    "first": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)).eval(), "input_1|input"),
    "activation between": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)).eval(),
        r"no layer that it can be folded into \(ReLU\)",
    ),
    "another kind of layer": (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.BatchNorm2d(3)).eval(),
        "it follows a Linear",
    ),
    "3-D": (lambda: nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)).eval(), "BatchNorm3d is"),
    "output used twice": (block(lambda m, x: m.bn(y := m.conv(x)) + y), "used elsewhere"),
    "output returned": (block(lambda m, x: (m.bn(y := m.conv(x)), y)), "used elsewhere"),
    "norm called with something else, too": (
        block(lambda m, x: m.bn(m.conv(x)) + m.bn(F.pad(x, (0, -2, 0, -2, 0, 1)))),
        r"no layer .*\(.*pad\)",
    ),
    "layer called for something else, too": (
        block(lambda m, x: m.bn(m.conv(x)) + m.conv(x)),
        "used elsewhere",
    ),
    "layers share a norm": (
        block(lambda m, x: m.bn(m.conv(x)) + m.bn(m.other(x)), other=nn.Conv2d(3, 4, 3)),
        "follows several layers",
    ),
    "two norms": (
        block(lambda m, x: m.bn(y := m.conv(x)) + m.second(y), second=nn.BatchNorm2d(4)),
        "used elsewhere",
    ),
    "weight used directly": (
        block(lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum()),
        "used directly",
    ),
    "never called": (block(lambda m, x: m.conv(x)), "no traced forward calls it"),
    "untraceable": (
        block(lambda m, x: m.bn(m.conv(x)) if x.sum() > 0 else m.bn(x)),
        r"torch\.fx cannot trace Block \(TraceError",
    ),
    "optional argument": (
        lambda: nn.Sequential(Optional()).eval(),
        "used elsewhere",
    ),
}


class Optional(Block):
    """What is usually not given shows in one of two branches."""

    def __init__(self):
        super().__init__(None)

    def forward(self, x, skip=None):
        y = self.conv(x)
        if skip is None:
            skip = y
        return self.bn(y) + skip


@pytest.mark.parametrize(("make", "reason"), KEPT.values(), ids=KEPT)
def test_norms_that_stay_say_why(make, reason):
    model = make()
    fused = lowbit.fuse(model)
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms
    for name in norms:
        assert type(fused.get_submodule(name)) is type(model.get_submodule(name))
    (note, *_) = notes(fused).values()
    assert note.startswith("batch norm not folded: ")
    assert re.search(reason, note), note
    models.assert_same_state(fused, models.state(model))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_weight_that_a_hook_computes_hinders_no_other():
    normed = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    layers = [normed, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]
    model = trained(nn.Sequential(*layers))
    report = lowbit.quantize_(model, "w8a8")
    assert [row.name for row in report.folded] == ["3"]
    assert "weight is computed by a hook" in models.row(model, "1").note


# --- Graphs --------------------------------------------------------------------------------------


def test_what_asks_for_shapes_only_does_not_hinder():
    def forward(m, x):
        y = m.conv(x)
        batch, height = y.shape[0], y.size(2)
        return m.bn(y).reshape(batch, -1, height)

    model = trained(Block(forward))
    x = torch.randn(2, 3, 8, 8)
    fused = lowbit.fuse(model, x)
    assert isinstance(fused.bn, nn.Identity)
    assert_same(fused, model, x)


def test_a_pair_that_is_called_twice_is_folded_once():
    model = trained(Block(lambda m, x: m.bn(m.conv(x)) + m.bn(m.conv(-x))))
    x = torch.randn(2, 3, 8, 8)
    fused = lowbit.fuse(model, x)
    assert isinstance(fused.bn, nn.Identity)
    assert_same(fused, model, x)
    shared = trained(Block(lambda m, x: m.bn(m.conv(x))))
    twice = nn.Sequential(shared, nn.Conv2d(4, 3, 1), shared).eval()
    fused = lowbit.fuse(twice, x)
    assert fused[0] is fused[2]
    assert_same(fused, twice, x)


def test_parts_of_a_model_that_cannot_be_traced():
    model = trained(
        Untraceable(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
            nn.Sequential(Untraceable(nn.Conv2d(4, 3, 1)), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
            Block(lambda m, x: m.bn(m.conv(x))),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )
    )
    x = torch.randn(2, 3, 8, 8)
    fused = lowbit.fuse(model, x)
    assert_same(fused, model, x)
    found = notes(fused)
    assert found["blocks.0.1"] == "folded into 'blocks.0.0'"
    assert found["blocks.1.2"] == "folded into 'blocks.1.1'"
    assert found["blocks.2.bn"] == "folded into 'blocks.2.conv'"
    assert "torch.fx cannot trace Untraceable (TraceError" in found["blocks.4"]


def test_example_inputs_find_what_structure_does_not_show():
    class Taps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x):
            first = self.layers[0](x)
            return first, self.layers[1](first) if first.sum() > -1e9 else first

    model = trained(Taps())
    x = torch.randn(2, 3, 8, 8)
    assert isinstance(lowbit.fuse(model).layers[1], nn.Identity)
    with pytest.raises(RuntimeError, match="changed the output on example_inputs by"):
        lowbit.fuse(model, x)
    sequence = trained(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert isinstance(lowbit.fuse(sequence, torch.randn(3, 8))[1], nn.Identity)
    with pytest.raises(RuntimeError, match="changed the output"):  # it normalises the steps
        lowbit.fuse(sequence, torch.randn(3, 8, 8))


def test_tracing_leaves_the_model_alone():
    class Remembers(Block):
        def forward(self, x):
            self.last = x
            self.calls = getattr(self, "calls", 0) + 1
            self.count += 1
            return self.bn(self.conv(x))

    model = trained(Remembers(None))
    model.register_buffer("count", torch.zeros(()))
    fused = lowbit.fuse(model)
    assert isinstance(fused.bn, nn.Identity)
    for side in (model, fused):
        assert not hasattr(side, "last")
        assert not hasattr(side, "calls")
        assert side.count == 0


def test_the_copy_shares_nothing_and_keeps_attributes():
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    model[0].role = ["stem"]
    model[0].weight.requires_grad_(False)
    fused = lowbit.fuse(model)
    assert fused[0].role == ["stem"]
    assert fused[0].role is not model[0].role
    assert not fused[0].weight.requires_grad
    addresses = {p.data_ptr() for p in model.parameters()}
    assert not addresses & {p.data_ptr() for p in fused.parameters()}
    assert lowbit.summary(copy.deepcopy(fused)) == lowbit.summary(fused)


# --- In the conversion ---------------------------------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_conversion_folds_into_layers_that_convert(in_place):
    original = trained(models.RaggedNet())
    x = torch.randn(2, 3, 16, 16)

    def convert(**options):
        model = copy.deepcopy(original)
        if in_place:
            lowbit.quantize_(model, "w8a16", **options)
            return model
        return lowbit.quantize(model, "w8a16", **options)

    folded, plain = convert(), convert(fuse=False)
    assert isinstance(folded.norm, nn.Identity)
    assert isinstance(plain.norm, nn.BatchNorm2d)
    assert_same(folded, original, x, 0.02)
    assert_same(folded, plain, x, 0.02)
    report = lowbit.summary(folded)
    assert [row.name for row in report.folded] == ["norm"]
    assert models.row(folded, "stem").note == "batch norm 'norm' folded in"
    assert report.bytes_before == lowbit.summary(original).bytes_before
    assert report.to_dict()["folded"] == 1
    assert not notes(plain)
    kept = convert(overrides={"stem": None})
    assert isinstance(kept.norm, nn.BatchNorm2d)
    assert notes(kept) == {"norm": "batch norm not folded: 'stem' before it stays float"}


def test_the_account_of_a_fused_model_is_that_of_the_conversion():
    model = trained(models.RaggedNet())
    at_once, later = lowbit.quantize(model, "w4a8"), lowbit.quantize(lowbit.fuse(model), "w4a8")
    assert lowbit.summary(at_once) == lowbit.summary(later)
    models.assert_same_tensors(at_once, later)
    kept = lowbit.quantize(lowbit.fuse(model), "w4a8", overrides={"stem": None})
    assert models.row(kept, "stem").note == "override 'stem' is None; batch norm 'norm' folded in"


@pytest.mark.parametrize("overrides", [{}, {"stem": None}], ids=["converted", "float"])
@pytest.mark.parametrize("source", ["fused", "unfused"])
@pytest.mark.parametrize("target", ["fused", "unfused"])
def test_files(tmp_path, overrides, source, target):
    def build(kind):
        model = trained(models.RaggedNet())
        return lowbit.fuse(model) if kind == "fused" else model

    quantized = lowbit.quantize(build(source), "w4a8", overrides=overrides)
    lowbit.save_file(quantized, tmp_path / "model.safetensors")
    model = build(target)
    if overrides and (source, target) == ("unfused", "fused"):  # the file has the norm
        with pytest.raises(lowbit.FileFormatError, match="not in the model: 'norm"):
            lowbit.load_file(model, tmp_path / "model.safetensors")
        return
    loaded = lowbit.load_file(model, tmp_path / "model.safetensors")
    models.assert_same_tensors(loaded, quantized)
    assert lowbit.summary(loaded) == lowbit.summary(quantized)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), quantized(x))


def test_a_file_that_does_not_fit_leaves_the_norms(tmp_path):
    lowbit.save_file(lowbit.quantize(trained(models.RaggedNet()), "w4a8"), tmp_path / "x")
    other = trained(models.RaggedNet(width=32))
    before = models.state(other)
    with pytest.raises(lowbit.FileFormatError, match="does not fit the model"):
        lowbit.load_file(other, tmp_path / "x")
    assert isinstance(other.norm, nn.BatchNorm2d)
    assert other.stem.bias is None
    models.assert_same_state(other, before)


def test_efficientnet_folds_in_full():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = trained(package.EfficientNet.from_name("efficientnet-lite0"))
    fused = lowbit.fuse(model)
    assert len(lowbit.summary(fused).folded) == 49
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted, found = model.double()(x.double()), fused.double()(x.double())
    assert models.relative_error(found, wanted) < 1e-3
