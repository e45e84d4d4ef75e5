"""Networks of files: the float model is captured again, and the tensors come from the file."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import observers
from lowbit.calibration.prepared import Learned, Preparation
from lowbit.container import File
from lowbit.fuse import identity, out_channels
from lowbit.observers import Affine
from lowbit.report import FLOAT_CLASSES, set_entry
from lowbit.static.capture import NotCaptured
from lowbit.static.network import Network
from lowbit.static.prepared import Conversion, PreparedNetwork, captured


def description(network: Network) -> dict[str, Any]:
    """What a file says of a network beside its layers, as plain values."""
    by_name = {node.name: node for node in network.nodes}
    inputs = {
        argument: {
            "shape": list(by_name[name].shape),
            "dtype": str(by_name[name].dtype).removeprefix("torch."),
        }
        for argument, name in network._inputs.items()
    }
    return {"inputs": inputs, "folded": list(network.folded)}


def empty_network(model: nn.Module, file: File) -> Network:
    """The network of a file, its tensors still to come.

    Args:
        model: the float model; its weights are not read.
        file: of a network.

    Raises:
        FileFormatError: it is of another model.
    """
    network = file.network
    assert network is not None
    twin = _without_weights(model)
    modules = dict(twin.named_modules())
    try:
        folded = [str(name) for name in network["folded"]]
        examples = {
            str(name): torch.zeros(
                [int(size) for size in item["shape"]],
                dtype=getattr(torch, str(item["dtype"])),
                device="meta",
            )
            for name, item in dict(network["inputs"]).items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise file.error(f"damaged: its network ({error!r})") from None
    for name in folded:
        if name not in modules:
            raise file.error(f"'{name}' is not in the model: build it as the file's was built")
        owner = twin.get_submodule(name.rpartition(".")[0])
        owner._modules[name.rpartition(".")[2]] = identity(modules[name])
    layers = {}
    for name, module in modules.items():
        if name not in file.layers or not isinstance(module, FLOAT_CLASSES):
            continue
        layers[name] = Learned(Preparation(file.layers[name][1], fuse=False), None)
        if f"{name}.bias" in file.tensors and module._parameters.get("bias") is None:
            # A folded norm gave it one; its size is all that is asked of it here.
            bias = torch.empty(out_channels(module), device="meta")
            module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
    try:
        graph = captured(twin, examples, {id(modules[name]): layers[name] for name in layers})
    except NotCaptured as error:
        raise file.error(f"the model is not the one that was captured: {error}") from None
    prepared = PreparedNetwork(graph, layers, lambda activation: observers.make("minmax"))
    prepared.folded = folded
    result = Conversion(prepared, {name: Affine(1.0, 0) for name in prepared.observers}, True).run()
    for name in layers:
        entry = file.account.get(name)
        if entry is not None and name in dict(result.named_modules()):
            set_entry(result.get_submodule(name), _with_scheme(entry, file.layers[name][1]))
    return result


def _with_scheme(entry: Any, scheme: Any) -> Any:
    return type(entry)(**{**vars(entry), "scheme": scheme})


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters and buffers are on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    result = copy.deepcopy(model, memo)
    assert all(isinstance(tensor, Tensor) for tensor in result.state_dict().values())
    return result.eval()
