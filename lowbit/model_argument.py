"""`MODEL` on the command line, `package.module:factory`, and what to run that model on."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import one_line

if TYPE_CHECKING:
    from torch import nn


class CommandError(Exception):
    """A command failed for a reason that its user can act on; the message says how."""


class UsageError(CommandError):
    """The command line asks for something that does not exist."""


def find(name: str) -> Any:
    """The object that `package.module:attribute` names; the current directory is searched first.

    Raises:
        UsageError: not of that form.
        CommandError: no such module or attribute, or the import fails.
    """
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        raise UsageError(f"MODEL is package.module:factory, not {name!r}")
    path = Path(module_name)
    if path.suffix == ".py" or len(path.parts) > 1:
        below = not (path.is_absolute() or ".." in path.parts)
        dotted = ".".join(path.with_suffix("").parts) if below else path.stem
        where = "" if below else f", in the directory {path.parent}"
        raise UsageError(f"MODEL names a module, not a file: write {dotted}:{attribute}{where}")
    if os.getcwd() not in sys.path:  # for good: a factory may import more when it is called
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise CommandError(
                f"there is no module {error.name!r}, neither in the current directory nor among "
                "the installed packages"
            ) from error
        raise CommandError(f"importing {module_name!r} failed: {error}; install it") from error
    except Exception as error:
        raise CommandError(f"importing {module_name!r} failed: {one_line(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, [n for n in dir(found) if n[0] != "_"], n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise CommandError(f"{module_name!r} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def build(factory: Any, name: str) -> nn.Module:
    """The model: the object itself, or what calling it returns; in eval mode.

    Raises:
        CommandError: it is no model and cannot be called, the call fails, or returns no model.
    """
    from torch import nn

    made = factory
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            kind = type(factory).__name__
            raise CommandError(f"{name} (type {kind}) is neither an nn.Module nor callable")
        try:
            made = factory()
        except Exception as error:
            raise CommandError(f"{name}() failed: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise CommandError(f"{name}() returned no nn.Module, but type {type(made).__name__}")
    made.eval()
    return made


def random_input(shape: Sequence[int], seed: int) -> tuple[Any, str]:
    """A standard normal float32 tensor, and its description."""
    import torch

    x = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
    return x, f"random normal, {'x'.join(map(str, shape))}, seed {seed}"


def example_inputs(*owners: Any) -> tuple[Any, str]:
    """The attribute `example_inputs` of the factory or the model: inputs, or a callable for them.

    Raises:
        UsageError: none has one.
    """
    for owner in owners:
        example = getattr(owner, "example_inputs", None)
        if example is not None:
            return example() if callable(example) else example, "the model's example_inputs"
    raise UsageError(
        "what shall the model run on? Give --input-shape 1,3,224,224 (random normal), or --inputs "
        "FILE, or set an attribute example_inputs on the factory"
    )


def model_and_inputs(arguments: argparse.Namespace) -> tuple[nn.Module, Any, str]:
    """The model of MODEL, and the inputs of --inputs, --input-shape or its own, described.

    Raises:
        UsageError, CommandError: as the functions above and below.
    """
    factory = find(arguments.model)
    model = build(factory, arguments.model)
    if arguments.inputs is not None:
        return model, *read_inputs(arguments.inputs)
    if arguments.input_shape is not None:
        return model, *random_input(arguments.input_shape, arguments.seed)
    return model, *example_inputs(factory, model)


def read_inputs(path: Path, option: str = "--inputs") -> tuple[Any, str]:
    """Inputs from a file, and its description.

    Args:
        path: .npy (one array), .safetensors (one tensor, or several: keyword arguments by name) or
            .pt (a tensor, a tuple, a mapping, or a list of batches of these; weights only).
        option: of the command line, for messages.

    Raises:
        UsageError: another suffix.
        CommandError: the file does not exist or cannot be read.
    """
    if path.suffix not in (".pt", ".pth", ".npy", ".safetensors"):
        raise UsageError(f"{path}: {option} takes .pt, .npy or .safetensors")
    if not path.is_file():
        raise CommandError(f"{path}: no such file")
    try:
        return _read(path), str(path)
    except Exception as error:
        raise CommandError(f"{path} cannot be read: {one_line(error)}") from error


def read_labels(path: Path) -> list[str]:
    """Names of classes, one a line, in the order of the outputs.

    Raises:
        CommandError: the file does not exist or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} cannot be read: {one_line(error)}") from error


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        import numpy as np
        import torch

        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        return next(iter(tensors.values())) if len(tensors) == 1 else tensors
    import torch

    return torch.load(path, weights_only=True)
