"""How errors of other people's code are told; what is refused as a model."""

import pytest
from torch import nn

import lowbit
from lowbit.errors import one_line


def test_one_line():
    assert one_line(ValueError("first\nsecond")) == "ValueError: first"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("x" * 500)) == "ValueError: " + "x" * 185 + "..."


NO_MODELS = [
    (nn.Linear(2, 2).state_dict(), "is a state dict, not a torch.nn.Module: build the model"),
    (nn.Linear, "is the class Linear, not a torch.nn.Module: pass an instance"),
    ("model.pt", "is a str, not"),
    (None, "is a NoneType, not"),
    ({}, "is a dict, not"),
]


@pytest.mark.parametrize(("model", "words"), NO_MODELS)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: lowbit.quantize(model, "w8a8"),
        lambda model: lowbit.quantize_(model, "w8a8"),
        lambda model: lowbit.prepare_qat(model, "w8a8"),
        lambda model: lowbit.compare(model, ["w8a8"], None),
        lambda model: lowbit.save_file(model, "no.safetensors"),
        lambda model: lowbit.load_file(model, "no.safetensors"),
        lowbit.fuse,
        lowbit.summary,
    ],
    ids=["quantize", "quantize_", "qat", "compare", "save", "load", "fuse", "summary"],
)
def test_what_is_no_model(use, model, words):
    with pytest.raises(TypeError, match=f"^the model {words}"):
        use(model)


def test_arguments_in_the_wrong_order():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="the model is a str"):
        lowbit.quantize("w8a8", model)
    with pytest.raises(TypeError, match=r"recipe such as 'w4a8'.*not Sequential") as error:
        lowbit.quantize(model, model)
    assert len(str(error.value)) < 200  # not the whole model
    with pytest.raises(TypeError, match=r"overrides is a mapping.*not a list"):
        lowbit.quantize(model, "w8a8", overrides=["0"])
    with pytest.raises(TypeError, match="by strings, not by a Linear"):
        lowbit.quantize(model, "w8a8", overrides={model[0]: None})
