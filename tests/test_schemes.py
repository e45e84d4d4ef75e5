"""Schemes: names, round trips, and what is refused."""

import dataclasses

import pytest
import torch

from lowbit.schemes import RECIPES, VERSION, Scheme


@pytest.mark.parametrize("group", ["", "-g32", "-g128"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_round_trip(recipe, group):
    scheme = Scheme.parse(recipe + group)
    assert scheme.name == str(scheme) == recipe + group
    assert scheme.group_size == (int(group[2:]) if group else None)
    for again in (
        Scheme.parse(scheme.name),
        Scheme.parse(scheme),
        Scheme.parse(scheme.to_dict()),
        Scheme.from_dict(scheme.to_dict()),
        Scheme.from_json(scheme.to_json()),
    ):
        assert again == scheme
        assert hash(again) == hash(scheme)


@pytest.mark.parametrize("group", ["", "-g64"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_static_recipes(recipe, group):
    scheme = Scheme.parse(f"{recipe}{group}-static")
    assert scheme.static
    assert scheme.name == f"{recipe}{group}-static"
    assert scheme == dataclasses.replace(Scheme.parse(recipe + group), static=True)
    assert scheme != Scheme.parse(recipe + group)
    assert Scheme.from_json(scheme.to_json()) == scheme
    assert Scheme.from_dict({**scheme.to_dict(), "static": False}) == Scheme.parse(recipe + group)


def test_static_and_a_quantizer_in_the_name():
    scheme = Scheme("int4", group_size=32, quantizer="minmax", static=True)
    assert scheme.name == "w4a8-g32-static-minmax"
    assert Scheme.parse(scheme.name) == scheme
    for name in ("w4a8-static-g32", "w4a8-minmax-static", "w4a8-static-static", "static"):
        with pytest.raises(ValueError, match=f"unknown scheme '{name}'.*'-static' for calibrated"):
            Scheme.parse(name)
    with pytest.raises(ValueError, match="static is True or False, not 1"):
        Scheme(static=1)


def test_what_recipes_mean():
    assert Scheme.parse("w8a8") == Scheme("int8", "int8", None, "minmax")
    assert Scheme.parse("w4a16-g64") == Scheme("int4", "int16", 64, "mse")
    assert Scheme.parse("w2a8") == Scheme("int2", "int8", None, "mse")
    assert Scheme.parse("wta16") == Scheme("ternary", "int16", None, "mse")
    assert Scheme.parse("w1a1") == Scheme("binary", "binary", None, "mean")


def test_quantizer_in_the_name():
    scheme = Scheme("int4", quantizer="minmax", group_size=32)
    assert scheme.name == "w4a8-g32-minmax"
    assert Scheme.parse("w4a8-g32-minmax") == scheme
    assert Scheme.parse("w4a8-mse").name == "w4a8"


def test_torch_dtypes():
    assert Scheme(torch.int8, torch.int16) == Scheme("int8", "int16")
    assert Scheme(torch.int4, torch.int8) == Scheme("int4", "int8")
    assert Scheme(torch.int2) == Scheme("int2")
    assert Scheme(torch.int1, torch.int1) == Scheme("binary", "binary")
    with pytest.raises(ValueError, match=r"torch\.float32.*int8, int4"):
        Scheme(torch.float32)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Scheme("int4").weight = "int8"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": "int3"}, r"weight format 'int3'.*int8, int4, int2, ternary, binary"),
        ({"weight": None}, "weight format None"),
        ({"weight": ["int4"]}, "weight format"),
        ({"activation": "int4"}, r"activation format 'int4'.*int8, int16, binary"),
        ({"group_size": 0}, "group_size 0 is not a positive multiple of 32"),
        ({"group_size": -32}, "group_size -32"),
        ({"group_size": 48}, "group_size 48.*e.g. 32"),
        ({"group_size": True}, "group_size True"),
        ({"group_size": 32.0}, "group_size 32.0"),
        ({"group_size": "32"}, "group_size '32'"),
        ({"quantizer": "awq"}, "no quantizer 'awq' for int4 weights; use one of minmax, mse"),
        ({"quantizer": "mean"}, "no quantizer 'mean' for int4"),
        ({"weight": "binary", "quantizer": "mse"}, "'mse' for binary weights; use one of mean"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


@pytest.mark.parametrize(
    "text",
    ["", "w3a8", "w4", "w4a4", "W4A8", "w4a8-g", "w4a8g32", "w4a8-128", "w4a8-g32-", "w4a8 "],
)
def test_unknown_recipe_lists_those_that_exist(text):
    with pytest.raises(ValueError, match=r"unknown scheme .*w8a8, w4a8.*-g128"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["w4a8-g33", "w4a8-g0"])
def test_recipe_with_bad_group(text):
    with pytest.raises(ValueError, match="multiple of 32"):
        Scheme.parse(text)


@pytest.mark.parametrize("value", [8, None, ("int4", "int8"), torch.int8])
def test_parse_refuses_other_types(value):
    with pytest.raises(TypeError, match="a scheme is a recipe"):
        Scheme.parse(value)


def test_dict_versions_and_fields():
    data = Scheme("int2", group_size=64).to_dict()
    assert data == {
        "version": VERSION,
        "weight": "int2",
        "activation": "int8",
        "group_size": 64,
        "quantizer": "mse",
        "static": False,
    }
    assert Scheme.from_dict({"weight": "int2"}) == Scheme("int2")
    with pytest.raises(ValueError, match="scheme version 99 is not version 1"):
        Scheme.from_dict({**data, "version": 99})
    with pytest.raises(ValueError, match=r"unknown scheme fields \['bits'\]"):
        Scheme.from_dict({**data, "bits": 4})


@pytest.mark.parametrize("text", ["[]", "4", '"w4a8"', "{", ""])
def test_bad_json(text):
    with pytest.raises(ValueError):  # noqa: PT011  the JSON decoder's own message is as good
        Scheme.from_json(text)
