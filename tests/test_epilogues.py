"""Activations that converted layers compute: which are absorbed, which are not, and the account."""

from __future__ import annotations

import copy
import io
import json
import re

import expected
import models
import pytest
import torch
from torch import nn

import lowbit

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}


def conv(inputs=8, outputs=8, **kwargs):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, **kwargs)
    nn.init.normal_(layer.weight)
    return layer


def norm(channels=8):
    layer = nn.BatchNorm2d(channels)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def image(*shape):
    return torch.randn(shape or (2, 8, 7, 6))


class Block(nn.Module):
    """Modules, and a forward that is given."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


def epilogues(model):
    """Of all layers, in order."""
    return [m.epilogue for m in model.modules() if hasattr(m, "epilogue")]


def assert_same_function(model, x, scheme="w8a8", **kwargs):
    """The converted model, checked against one whose activations stay."""
    model.eval()
    before = models.state(model)
    plain = lowbit.quantize(lowbit.fuse(model), scheme, fuse=False, **kwargs)
    assert set(epilogues(plain)) <= {"none"}
    result = lowbit.quantize(model, scheme, **kwargs)
    with torch.no_grad():
        assert expected.same_bits(result(x), plain(x))
    models.assert_same_state(model, before)
    in_place = copy.deepcopy(model)
    lowbit.quantize_(in_place, scheme, **kwargs)
    assert epilogues(in_place) == epilogues(result)
    with torch.no_grad():
        assert expected.same_bits(in_place(x), plain(x))
    return result


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(6, 8), (5, 6)),
        (lambda: nn.Conv1d(6, 8, 3), (2, 6, 9)),
        (lambda: nn.Conv2d(6, 8, 3), (2, 6, 9, 9)),
        (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    ],
)
def test_behind_a_layer(layer, x, name, inplace):
    model = nn.Sequential(layer(), ACTIVATIONS[name](inplace=inplace))
    result = assert_same_function(model, torch.randn(x) * 4)
    assert result[0].epilogue == name
    assert type(result[1]) is nn.Identity
    kind = ACTIVATIONS[name].__name__
    assert models.row(result, "0").note == f"followed by {kind}, computed in its epilogue"
    assert [row.name for row in lowbit.summary(result).rows] == ["0"]


def test_behind_a_folded_norm():
    model = nn.Sequential(conv(), norm(), nn.ReLU6())
    result = assert_same_function(model, image())
    assert [type(m).__name__ for m in result] == ["Conv2d", "Identity", "Identity"]
    assert epilogues(result) == ["relu6"]
    note = models.row(result, "0").note
    assert "followed by ReLU6" in note
    assert "batch norm '1' folded in" in note
    assert len(lowbit.summary(result).folded) == 1


def test_behind_a_norm_that_was_folded_before():
    model = lowbit.fuse(nn.Sequential(conv(), norm(), nn.ReLU6()).eval())
    assert [type(m) for m in model] == [nn.Conv2d, nn.Identity, nn.ReLU6]
    assert epilogues(assert_same_function(model, image())) == ["relu6"]


def test_fuse_itself_leaves_activations():
    fused = lowbit.fuse(nn.Sequential(conv(), norm(), nn.ReLU()).eval())
    assert type(fused[2]) is nn.ReLU


def test_fuse_false():
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    result = lowbit.quantize(model, "w8a8", fuse=False)
    assert type(result[1]) is nn.ReLU
    assert epilogues(result) == ["none"]
    assert expected.same_bits(result(x := image()), lowbit.quantize(model, "w8a8")(x))


def test_shared_by_several_calls():
    def forward(self, x):
        x = self.act(self.bn(self.first(x)))
        return self.last(self.act(self.second(x)))

    block = Block(
        forward, first=conv(), bn=norm(), second=conv(groups=8), last=conv(), act=nn.ReLU6()
    )
    result = assert_same_function(block, image())
    assert [result.first.epilogue, result.second.epilogue] == ["relu6"] * 2
    assert result.last.epilogue == "none"
    assert type(result.act) is nn.Identity


def test_shared_by_several_parents():
    act = nn.ReLU()
    model = nn.Sequential(nn.Sequential(conv(), act), nn.Sequential(conv(), act))
    result = assert_same_function(model, image())
    assert epilogues(result) == ["relu", "relu"]
    assert result[0][1] is result[1][1]
    assert type(result[0][1]) is nn.Identity


def test_a_layer_called_twice():
    block = Block(lambda self, x: self.act(self.conv(self.act(self.conv(x)))), conv=conv())
    block.act = nn.ReLU()
    assert epilogues(assert_same_function(block, image())) == ["relu"]


def test_the_output_may_be_asked_for_its_shape():
    def forward(self, x):
        y = self.conv(x)
        return self.act(y).reshape(y.shape[0], -1)

    block = Block(forward, conv=conv(), act=nn.ReLU())
    assert epilogues(assert_same_function(block, image())) == ["relu"]


def untraceable(self, x):
    return self.act(self.body(x)) if x.sum() > 0 else self.act(x)


class Shifted(nn.ReLU):
    def forward(self, input):
        return super().forward(input - 1)


NOT_ABSORBED = {
    "input used elsewhere": lambda: Block(
        lambda self, x: (y := self.conv(x)) + self.act(y), conv=conv(), act=nn.ReLU()
    ),
    "input used elsewhere, in place": lambda: Block(
        lambda self, x: (y := self.conv(x), self.act(y))[0], conv=conv(), act=nn.ReLU(inplace=True)
    ),
    "a norm's output used elsewhere": lambda: Block(
        lambda self, x: (y := self.bn(self.conv(x))) - self.act(y),
        conv=conv(),
        bn=norm(),
        act=nn.ReLU(),
    ),
    "behind a sum": lambda: Block(
        lambda self, x: self.act(x + self.conv(x)), conv=conv(), act=nn.ReLU()
    ),
    "one of two calls behind a sum": lambda: Block(
        lambda self, x: self.act(x + self.second(self.act(self.first(x)))),
        first=conv(),
        second=conv(),
        act=nn.ReLU(),
    ),
    "a layer called twice, once without": lambda: Block(
        lambda self, x: self.conv(self.act(self.conv(x))), conv=conv(), act=nn.ReLU()
    ),
    "behind a pool": lambda: nn.Sequential(conv(), nn.AvgPool2d(2), nn.ReLU()),
    "behind a transposed convolution": lambda: nn.Sequential(
        conv(), nn.ConvTranspose2d(8, 8, 2), nn.ReLU()
    ),
    "behind a norm that stays": lambda: nn.Sequential(conv(), nn.GroupNorm(2, 8), nn.ReLU()),
    "another activation": lambda: nn.Sequential(conv(), nn.ELU()),
    "overridden": lambda: nn.Sequential(conv(), Shifted()),
    "in code that is not traced, too": lambda: Block(
        untraceable, body=nn.Sequential(conv(), act := nn.ReLU(), conv()), act=act
    ),
}


@pytest.mark.parametrize("case", NOT_ABSORBED)
def test_not_absorbed(case):
    model = NOT_ABSORBED[case]()
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.ReLU, nn.ELU))]
    result = assert_same_function(model, image())
    assert set(epilogues(result)) == {"none"}
    assert [type(m) for m in result.modules() if isinstance(m, (nn.ReLU, nn.ELU))] == kinds


def test_in_a_part_of_what_is_not_traced():
    body = nn.Sequential(conv(), nn.ReLU(), conv())
    block = Block(untraceable, body=body, act=nn.ReLU())
    result = assert_same_function(block, image())
    assert epilogues(result) == ["relu", "none"]
    assert type(result.act) is nn.ReLU


@pytest.mark.parametrize("where", ["conv", "act"])
def test_hooks_see_what_they_saw(where):
    block = Block(lambda self, x: self.act(self.conv(x)), conv=conv(), act=nn.ReLU())
    seen = []
    getattr(block, where).register_forward_hook(lambda m, args, y: seen.append(y.min().item()))
    result = assert_same_function(block, image())
    assert epilogues(result) == ["none"]
    seen.clear()
    result(image())
    assert (seen[0] < 0) == (where == "conv")


def test_layers_that_stay_float_keep_theirs():
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU())
    result = assert_same_function(model, image(), overrides={"0": None})
    assert type(result[1]) is nn.ReLU
    assert type(result[3]) is nn.Identity
    assert epilogues(result) == ["relu"]


def test_shared_with_a_layer_that_stays_float():
    act = nn.ReLU()
    model = nn.Sequential(conv(), act, conv(), act)
    result = assert_same_function(model, image(), overrides={"0": None})
    assert epilogues(result) == ["none"]
    assert type(result[1]) is nn.ReLU


def test_a_norm_in_training_mode_keeps_its_activation():
    model = nn.Sequential(conv(), norm(), nn.ReLU()).eval()
    model[1].train()
    result = lowbit.quantize(model, "w8a8")
    assert type(result[2]) is nn.ReLU
    assert epilogues(result) == ["none"]


def test_registered_converters_keep_theirs(monkeypatch):
    class Own(nn.Conv2d):
        def forward(self, input):
            return super().forward(input)

    monkeypatch.setattr(lowbit.rules, "_registered", {})
    lowbit.register_converter(Own, lambda m, scheme: lowbit.nn.Conv2d.from_float(m, scheme))
    model = nn.Sequential(Own(8, 8, 3), nn.ReLU()).eval()
    result = lowbit.quantize(model, "w8a8")
    assert type(result[1]) is nn.ReLU
    assert epilogues(result) == ["none"]


def test_training_mode_is_kept():
    model = nn.Sequential(conv(), nn.ReLU()).train()
    assert lowbit.quantize(model, "w8a8")[1].training
    assert not lowbit.quantize(model.eval(), "w8a8")[1].training


def test_padded_convolutions(monkeypatch):
    class Conv2dStaticSamePadding(nn.Conv2d):
        def __init__(self):
            super().__init__(8, 8, 3, stride=2)
            self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

        def forward(self, x):
            return super().forward(self.static_padding(x))

    model = nn.Sequential(Conv2dStaticSamePadding(), norm(), nn.ReLU6())
    result = assert_same_function(model, image())
    assert epilogues(result) == ["relu6"]
    back = result[0].dequantize()
    torch.testing.assert_close(back(x := image()), result(x), rtol=0.1, atol=0.1)


def test_an_error_in_the_middle_leaves_activations(monkeypatch):
    model = nn.Sequential(conv(), nn.Hardswish(), conv(), nn.Hardswish()).eval()
    job = lowbit.plan.Job
    source = job.source

    def fail(self):
        if self.name == "2":
            raise ValueError("no memory")
        return source(self)

    monkeypatch.setattr(job, "source", fail)
    with pytest.raises(ValueError, match="no memory"):
        lowbit.quantize_(model, "w8a8")
    assert epilogues(model) == ["none"]
    assert [type(model[i]) for i in (1, 3)] == [nn.Hardswish] * 2


def test_compile_and_export():
    act = nn.ReLU6()
    model = nn.Sequential(conv(), norm(), act, conv(groups=8), act, nn.Flatten())
    x = image()
    result = assert_same_function(model, x)
    y = result(x)
    torch.compiler.reset()
    compiled = torch.compile(result, backend="aot_eager", fullgraph=True)
    assert expected.same_bits(compiled(x), y)
    program = torch.export.export(result, (x,))
    assert expected.same_bits(program.module()(x), y)


# --- Files ---------------------------------------------------------------------------------------


def network():
    act = nn.ReLU6()
    blocks = nn.Sequential(conv(), norm(), act, conv(groups=8), act)
    return nn.Sequential(blocks, nn.Conv2d(8, 4, 1), nn.Hardswish(), nn.Flatten()).eval()


@pytest.fixture
def written(tmp_path):
    model = network()
    result = lowbit.quantize(model, "w4a8")
    path = tmp_path / "model.safetensors"
    lowbit.save_file(result, path)
    return model, result, path


def test_load_file(written):
    model, result, path = written
    loaded = lowbit.load_file(copy.deepcopy(model), path)
    x = image()
    assert expected.same_bits(loaded(x), result(x))
    assert epilogues(loaded) == epilogues(result) == ["relu6", "relu6", "hardswish"]
    assert loaded[0][2] is loaded[0][4]
    assert not any(isinstance(m, (nn.ReLU6, nn.Hardswish)) for m in loaded.modules())
    assert lowbit.summary(loaded) == lowbit.summary(result)
    again = path.with_name("again.safetensors")
    lowbit.save_file(loaded, again)
    assert expected.same_bits(lowbit.load_file(copy.deepcopy(model), again)(x), result(x))
    assert expected.same_bits(lowbit.load_file(loaded, path)(x), result(x))


def test_load_file_onto_the_meta_device(written):
    model, result, path = written
    loaded = lowbit.load_file(copy.deepcopy(model).to("meta"), path)
    x = image()
    assert expected.same_bits(loaded(x), result(x))


@pytest.mark.parametrize("fuse", [True, False])
def test_load_file_into_a_converted_model_of_other_epilogues(tmp_path, fuse):
    model = nn.Sequential(conv(), nn.ReLU()).eval()
    path = tmp_path / "model.safetensors"
    lowbit.save_file(lowbit.quantize(model, "w8a8", fuse=fuse), path)
    other = lowbit.quantize(model, "w8a8", fuse=not fuse)
    x = image()
    y, kinds = other(x), [type(m) for m in other]
    with pytest.raises(lowbit.FileFormatError, match="layer '0' has the epilogue"):
        lowbit.load_file(other, path)
    assert [type(m) for m in other] == kinds
    assert expected.same_bits(other(x), y)


@pytest.mark.parametrize(
    ("epilogues", "message"), [({"0.0": "softmax"}, "softmax"), ({"2": "relu"}, "no layer: '2'")]
)
def test_damaged_files(written, epilogues, message):
    model, _, path = written
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header["__metadata__"]["lowbit"])
    metadata["epilogues"] = epilogues
    header["__metadata__"]["lowbit"] = json.dumps(metadata)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(lowbit.FileFormatError, match=re.escape(message)):
        lowbit.load_file(model, path)
    assert [type(m) for m in model.modules()] == kinds


def test_state_dict_and_pickle(written):
    _, result, _ = written
    x = image()
    other = lowbit.quantize(network(), "w4a8")
    other.load_state_dict(result.state_dict())
    assert expected.same_bits(other(x), result(x))
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert epilogues(loaded) == epilogues(result)
    assert expected.same_bits(loaded(x), result(x))
    assert lowbit.summary(copy.deepcopy(result)) == lowbit.summary(result)
