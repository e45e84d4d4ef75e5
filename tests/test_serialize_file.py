"""Files: what is in them, and that weights are mapped and not copied."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys
import textwrap

import pytest
import torch
from models import RaggedNet as Net
from models import assert_same_tensors, trained
from safetensors import safe_open
from safetensors.torch import load_file as load_tensors

import lowbit


def test_the_file_is_a_plain_safetensors_file(saved):
    model, path = saved
    tensors = load_tensors(path)
    assert set(tensors) == set(model.state_dict())
    with safe_open(path, "pt") as handle:
        header = json.loads(handle.metadata()["lowbit"])
    assert header["layout_version"] == 2
    assert header["layers"]["fc"]["class"] == "Linear"
    assert header["layers"]["fc"]["scheme"] == model.fc.scheme.to_dict()
    assert "head" not in header["layers"]


def test_weights_are_mapped_not_copied(tmp_path):
    path = tmp_path / "model.safetensors"
    lowbit.save_file(lowbit.quantize(trained(Net(width=32)), "w4a8-g32"), path)
    loaded = lowbit.load_file(Net(width=32).eval(), path)
    with open("/proc/self/maps") as maps:
        lines = [line for line in maps if line.rstrip().endswith(str(path))]
    ranges = [[int(x, 16) for x in line.split()[0].split("-")] for line in lines]
    assert ranges
    tensors = loaded.state_dict()
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    loaded(torch.randn(1, 3, 16, 16))
    assert pointers == {name: t.data_ptr() for name, t in loaded.state_dict().items()}
    mapped = {n for n, p in pointers.items() if any(low <= p < high for low, high in ranges)}
    assert all(pointer % 64 == 0 for pointer in pointers.values())
    # All but small tensors of odd sizes, which would lie askew in the file.
    assert mapped >= {name for name, tensor in tensors.items() if tensor.nbytes % 64 == 0}
    assert mapped >= {f"{name}.weight_packed" for name in ("stem", "grouped", "depthwise", "fc")}


def test_a_loaded_model_may_be_written_to_the_same_file(saved):
    model, path = saved
    loaded = lowbit.load_file(Net().eval(), path)
    lowbit.save_file(loaded, path)
    assert_same_tensors(loaded, model)
    assert_same_tensors(lowbit.load_file(Net().eval(), path), model)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_writing_to_a_loaded_model_leaves_the_file_alone(saved):
    _, path = saved
    before = path.read_bytes()
    loaded = lowbit.load_file(Net().eval(), path)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    assert path.read_bytes() == before


def test_loaded_models_copy_and_pickle_by_layer(saved):
    _, path = saved
    loaded = lowbit.load_file(Net().eval(), path)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(copy.deepcopy(loaded)(x), loaded(x))
    stream = io.BytesIO()
    torch.save(loaded.fc.state_dict(), stream)
    assert stream.tell() < path.stat().st_size + 8192


def test_plain_state_dicts_load_with_weights_only(saved):
    model, _ = saved
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    tensors = torch.load(stream, weights_only=True)
    other = lowbit.quantize(Net().eval(), "w4a8", overrides={"head": None})
    other.load_state_dict(tensors)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(other(x), model(x))


MEMORY = textwrap.dedent(
    """
    import gc, sys, torch
    import lowbit
    from torch import nn

    def rss():
        gc.collect()
        with open("/proc/self/status") as f:
            fields = dict(line.split(":", 1) for line in f)
        return [int(fields[k].split()[0]) / 1024 for k in ("VmRSS", "RssAnon", "VmHWM")]

    def build():
        with torch.device("meta"):
            return nn.Sequential(*[nn.Linear(4096, 4096, bias=False) for _ in range(8)])

    path = sys.argv[1]
    if sys.argv[2] == "save":
        layer = lowbit.quantize(nn.Linear(4096, 4096, bias=False), "w8a8")
        model = nn.Sequential(*[lowbit.nn.Linear(4096, 4096, bias=False, scheme="w8a8")
                                for _ in range(8)])
        for part in model:
            part.load_state_dict(layer.state_dict())
        lowbit.save_file(model, path)
    else:
        torch.set_num_threads(1)
        before = rss()
        model = lowbit.load_file(build(), path)
        y = model(torch.randn(1, 4096))
        print(*before, *rss())
    """
)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_and_running_holds_the_weights_once(tmp_path):
    def run(mode):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.safetensors"), mode]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert result.returncode == 0, result.stderr
        return [float(number) for number in result.stdout.split()]

    run("save")
    weights = 8 * 16.0  # MiB
    before, anonymous_before, _, after, anonymous, peak = run("load")
    assert anonymous - anonymous_before < weights / 4  # pages of the file, not copies of them
    assert after - before < 1.25 * weights
    assert peak - before < 1.25 * weights
