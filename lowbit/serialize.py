"""Save and load converted models: written as they lie in memory, mapped when loaded.

`container.py` is the file. `load_file` rebuilds the layers from the float model by the rules of
the conversion, and takes tensors, schemes and the account from the file; the file's class names are
only compared.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowbit import rules
from lowbit.carried import carried_state, carry_over
from lowbit.container import File, FileFormatError, read_file, write_file
from lowbit.convert import (
    child_slots,
    name_layer,
    run_converted_encoder_layers,
)
from lowbit.epilogues import ACTIVATIONS
from lowbit.errors import check_model
from lowbit.fuse import identity, out_channels
from lowbit.nn import LAYERS
from lowbit.nn.base import QuantizedLayer
from lowbit.nn.loading import state_problems
from lowbit.report import (
    FLOAT_CLASSES,
    Entry,
    entry_of,
    holds_weights,
    is_converted,
    is_unit,
    lowbit_layers,
    set_entry,
    walk,
    weight_shape,
)
from lowbit.schemes import Scheme
from lowbit.static.loading import description, empty_network
from lowbit.static.network import Network

__all__ = ["FileFormatError", "load_file", "save_file"]

_BUILTIN = (*LAYERS.values(), rules.PaddedConv2d)
_SHOWN = 6  # names that an error message lists


def save_file(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the tensors and the schemes of a model to a safetensors file.

    The file appears whole or not at all, and may be the one that the model was loaded from.
    Tensors that are shared are written once.

    Args:
        model: converted by lowbit, in whole or in part.
        path: of the file; replaced if it exists.

    Raises:
        ValueError: the state dict has something that no safetensors file can hold: a tensor on
            the meta device, a sparse one, or extra state that is no tensor.
        OSError: the file cannot be written.
    """
    check_model(model)
    file = File(os.fspath(path))
    _collect_tensors(model, file)
    if isinstance(model, Network):
        file.network = description(model)
    for name, module, _ in walk(model, stop=is_unit):
        entry = entry_of(module)
        if entry is not None:
            file.account[name] = entry
        if is_converted(module):
            file.layers[name] = type(module).__name__, _scheme_of(module)
            for inner, layer in _packed_layers(name, module):
                if layer.epilogue != "none":
                    file.epilogues[inner] = layer.epilogue
    write_file(file, _package_version())


def load_file(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a file of `save_file` into a model of the same architecture.

    The layers that are converted in the file are replaced by lowbit layers, batch norms that are
    folded in the file and activations that layers compute there by `nn.Identity`, and all tensors
    by those of the file. They are mapped, not read: weights are in memory once, on demand, and
    shared with every other process that maps the file. The model's own weights are not read and
    may be on the meta device.

    Args:
        model: the float model, built as it was before its conversion, or a converted one with the
            same schemes. Changed in place; untouched if the file does not fit.
        path: of the file. It must not be overwritten in place while the model is in use.

    Returns:
        The model; where it is itself a layer, the lowbit layer; of a file of a static network, a
        new `lowbit.static.Network`, for which the float model is captured again.

    Raises:
        FileFormatError: a ValueError. The file is damaged, not written by lowbit, newer than this
            lowbit, or of a model with other layers: the message names the file, the layer and the
            remedy.
        OSError: the file cannot be read.
    """
    check_model(model)
    file = read_file(path)
    if file.network is not None and not isinstance(model, Network):
        model = empty_network(model, file)
    with _folded_norms(model, file):
        slots = child_slots(model)
        layers = _empty_layers(model, file)
        modules = {name: model.get_submodule(name) for name in layers}
        replaced = {id(modules[name]): layer for name, layer in layers.items()}
        _check_fit(file, _expected(model, replaced, file))
        _check_codes(file, layers)
        _check_epilogues(file, modules, layers)
        ties = _tied_parameters(model, file)
    # From here on the model changes.
    for name, layer in reversed(layers.items()):  # the first of several names is the one to keep
        if layer is not modules[name]:
            carry_over(carried_state(modules[name], type(layer) in _BUILTIN), layer)
            for parent, key in slots.get(id(modules[name]), []):
                parent._modules[key] = layer
        name_layer(layer, name)
        for inner, part in _packed_layers(name, layer):
            part.epilogue = file.epilogues.get(inner, "none")
    model = replaced.get(id(model), model)
    try:
        model.load_state_dict(file.tensors, strict=True, assign=True)
    except (RuntimeError, ValueError) as error:
        raise FileFormatError(f"{path}: {error}") from error
    for owner, key, first in ties:
        prefix, _, first_key = first.rpartition(".")
        owner._parameters[key] = model.get_submodule(prefix)._parameters[first_key]
    _restore_account(model, file)
    run_converted_encoder_layers(model)
    left = [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if left:
        raise FileFormatError(
            f"{path}: not in the file, and on the meta device in the model: {_list(left)}; build "
            "the model on the CPU"
        )
    return model


def _collect_tensors(model: nn.Module, file: File) -> None:
    """The state dict of a model, and which of its names share one tensor."""
    names: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"'{name}' is extra state of type {type(value).__name__}, no tensor")
        file.tensors[name] = value.detach()
        if value.layout == torch.strided and not value.is_meta and value.numel():
            same = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            first = names.setdefault(same, name)
            if first != name:
                file.aliases[name] = first


def _scheme_of(module: nn.Module) -> Scheme:
    entry = entry_of(module)
    if entry is not None and entry.scheme is not None:
        return entry.scheme
    return lowbit_layers(module)[0].scheme


def _package_version() -> str:
    import lowbit  # here: the package imports this module

    return str(getattr(lowbit, "__version__", "unknown"))


def _empty_layers(model: nn.Module, file: File) -> dict[str, nn.Module]:
    """A lowbit layer for each of the file, its tensors still to come; by name, the model unchanged.

    A layer that the model has under several names is one layer here too.
    """
    modules = {name: (module, parent) for name, module, parent in walk(model, is_unit)}
    made: dict[int, tuple[str, nn.Module]] = {}
    layers = {}
    for name, (class_name, scheme) in file.layers.items():
        if name not in modules:
            raise file.error(
                f"layer '{name}' ({class_name}, {scheme.name}) is not in the model, a "
                f"{type(model).__name__}: build it as it was when the file was written"
            )
        module, parent = modules[name]
        if id(module) in made:
            first, layer = made[id(module)]
            if file.layers[first] != (class_name, scheme):
                raise file.error(f"'{first}' and '{name}' are one module in the model, not here")
        elif is_converted(module):
            layer = module
            if _scheme_of(module) != scheme:
                raise file.error(
                    f"layer '{name}' is {scheme.name}, but {_scheme_of(module).name} in the model "
                    "to load into: pass the float model"
                )
        else:
            layer = _empty_layer(file, name, module, parent, scheme)
        if type(layer).__name__ != class_name:
            raise file.error(
                f"layer '{name}' is a {class_name}, but a {type(layer).__name__} in the model: "
                "build it, and register its converters, as when the file was written"
            )
        made[id(module)] = name, layer
        layers[name] = layer
    return layers


def _empty_layer(
    file: File, name: str, module: nn.Module, parent: nn.Module | None, scheme: Scheme
) -> nn.Module:
    converter, reason = rules.find_empty_converter(module, parent)
    if converter is None:
        raise file.error(f"layer '{name}' cannot be converted to {scheme.name}: {reason}")
    try:
        with torch.no_grad():
            layer = converter(module, scheme)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise file.error(f"layer '{name}' ({scheme.name}): {error}") from error
    if layer is module or not isinstance(layer, nn.Module):
        raise file.error(f"layer '{name}': its converter made no lowbit layer")
    layer.train(module.training)
    note = file.account.get(name)
    set_entry(
        layer,
        Entry(
            kind=note.kind if note else type(module).__name__,
            shape=weight_shape(module),
            bytes_before=note.bytes_before if note else 0,
            note=note.note if note else "",
            scheme=scheme,
            folded=note.folded if note else "",
        ),
    )
    return layer


@contextlib.contextmanager
def _folded_norms(model: nn.Module, file: File) -> Iterator[None]:
    """Norms and activations that the file has in layers are taken out; back if something fails."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    slots = child_slots(model)
    for name, module, _ in list(walk(model, is_unit)):
        entry = file.account.get(name)
        if entry is None or not entry.folded:
            continue
        if isinstance(module, (_BatchNorm, *ACTIVATIONS)):
            place = identity(module)
            for parent, key in slots.get(id(module), []):
                undo.append((parent._modules, key, module))
                parent._modules[key] = place
        elif isinstance(module, FLOAT_CLASSES) and module._parameters.get("bias") is None:
            # A folded norm gives a layer a bias; its size is all that is asked of it here.
            weight = module._parameters["weight"]
            assert weight is not None
            bias = torch.empty(out_channels(module), dtype=weight.dtype, device="meta")
            undo.append((module._parameters, "bias", None))
            module._parameters["bias"] = nn.Parameter(bias, requires_grad=weight.requires_grad)
    try:
        yield
    except BaseException:
        for where, key, before in reversed(undo):
            where[key] = before
        raise


def _expected(model: nn.Module, replaced: Mapping[int, nn.Module], file: File) -> dict[str, Tensor]:
    """The state dict that the model will have, for its names, shapes and dtypes."""
    prefixes = {
        name: replaced[id(module)]
        for name, module, _ in walk(model, lambda m: id(m) in replaced)
        if id(module) in replaced
    }
    expected = dict(model.state_dict())
    for prefix, layer in prefixes.items():
        dot = f"{prefix}." if prefix else ""
        for key in [key for key in expected if key.startswith(dot)]:
            del expected[key]
        expected.update(layer.state_dict(prefix=dot))
        # Zero points are there if the checkpoint had them: the layer takes those of the file.
        for key in [key for key in expected if key.startswith(dot)]:
            if key.endswith("weight_group_scale"):
                zero = key.removesuffix("scale") + "zero"
                expected.pop(zero, None)
                if zero in file.tensors:
                    expected[zero] = expected[key]
    return expected


def _check_fit(file: File, expected: Mapping[str, Tensor]) -> None:
    missing = sorted(set(expected) - set(file.tensors))
    unexpected = sorted(set(file.tensors) - set(expected))
    problems = []
    if missing:
        problems.append(f"missing in the file: {_list(missing)}")
    if unexpected:
        problems.append(f"not in the model: {_list(unexpected)}")
    for name in sorted(set(expected) & set(file.tensors)):
        ours, theirs = expected[name], file.tensors[name]
        if not isinstance(ours, Tensor):
            problems.append(f"'{name}' is no tensor in the model")
        elif tuple(ours.shape) != tuple(theirs.shape):
            problems.append(f"'{name}' is {list(theirs.shape)}, the model has {list(ours.shape)}")
        elif ours.dtype != theirs.dtype:
            problems.append(f"'{name}' is {theirs.dtype}, the model has {ours.dtype}")
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise file.error(
            f"it does not fit the model: {'; '.join(problems[:_SHOWN])}{more}. Build the model "
            "with the architecture, options and dtype that it had when the file was written"
        )


def _tied_parameters(model: nn.Module, file: File) -> list[tuple[nn.Module, str, str]]:
    """Parameters that are tied in the model and in the file: (module, key, name of the first).

    Loading gives each name a parameter of its own; these are to be made one again.
    """
    first_names: dict[int, str] = {}
    first_modules: dict[int, str] = {}
    ties = []
    for name, module, _ in walk(model, is_unit):
        shared = first_modules.setdefault(id(module), name)
        if shared != name:
            for key in [k for k in file.tensors if k.startswith(f"{name}.")]:
                here, there = key, shared + key.removeprefix(name)
                if file.aliases.get(here, here) != file.aliases.get(there, there):
                    raise file.error(
                        f"'{shared}' and '{name}' are one module in the model, but the file has "
                        f"two tensors '{there}' and '{here}'"
                    )
            continue
        for key, parameter in module._parameters.items():
            here = f"{name}.{key}" if name else key
            if parameter is None or here not in file.tensors:
                continue
            first = first_names.setdefault(id(parameter), here)
            if first == here:
                continue
            if file.aliases.get(here, here) == file.aliases.get(first, first):
                ties.append((module, key, first))
    return ties


def _check_codes(file: File, layers: Mapping[str, nn.Module]) -> None:
    """What the layers themselves check when they load, before the model is changed."""
    for name, layer in layers.items():
        for inner, part in _packed_layers(name, layer):
            prefix = f"{inner}." if inner else ""
            problems = state_problems(file.tensors, prefix, part._layout(), part.scheme)
            if problems:
                raise file.error(f"layer '{inner}': {'; '.join(problems)}")


def _check_epilogues(
    file: File, modules: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]
) -> None:
    """Whether the file's epilogues are of its layers, and those of a converted model the same."""
    left = set(file.epilogues)
    for name, layer in layers.items():
        for inner, part in _packed_layers(name, layer):
            left.discard(inner)
            ours, theirs = part.epilogue, file.epilogues.get(inner, "none")
            if layer is modules[name] and ours != theirs:
                raise file.error(
                    f"layer '{inner}' has the epilogue '{theirs}', but '{ours}' in the model to "
                    "load into: pass the float model"
                )
    if left:
        raise file.error(f"damaged: epilogues of what is no layer: {_list(sorted(left))}")


def _packed_layers(name: str, module: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """The packed layers of a converted module that has this name, with theirs."""
    for inner, part in module.named_modules(prefix=name):
        if isinstance(part, QuantizedLayer):
            yield inner, part


def _restore_account(model: nn.Module, file: File) -> None:
    for name, module, _ in walk(model, is_unit):
        entry = file.account.get(name)
        accounted = holds_weights(module) or isinstance(module, (_BatchNorm, nn.Identity))
        if entry is not None and accounted and not is_converted(module):
            set_entry(module, entry)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + more
