"""The account of a conversion: every layer, its scheme, kernel and bytes, or why it stayed float.

`summary` computes it from the model alone. What the model cannot tell any more (the class and the
bytes of the float layer, the reason why a layer was kept) lies in a plain attribute that the
conversion leaves on each module, so the account survives `deepcopy` and `pickle`, and a part of a
model has one too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lowbit import _core
from lowbit.errors import check_model
from lowbit.nn import LAYERS
from lowbit.nn.base import QuantizedLayer
from lowbit.nn.layer import LowbitLayer
from lowbit.schemes import Scheme

FLOAT_CLASSES = tuple(LAYERS)
ROOT = "(root)"
_ENTRY = "_lowbit_entry"
_NAME_WIDTH, _KIND_WIDTH = 36, 23  # the table then fits 120 columns


@dataclass(frozen=True)
class Entry:
    """What the conversion knew of a module: kept in the module's attribute, read by `summary`.

    `scheme` is None for a module that stayed float. `folded` tells which batch norm is folded into
    this layer, into which layer this batch norm was, or which ones compute this activation.
    `bytes_before` counts a tensor that several modules share once, at the first of them.
    """

    kind: str
    shape: tuple[int, ...]
    bytes_before: int
    note: str = ""
    scheme: Scheme | None = None
    folded: str = ""


@dataclass(frozen=True)
class Row:
    """One module that holds weights, under one of its names.

    Attributes:
        name: fully qualified name; "(root)" for the model itself.
        kind: class of the float module ("Linear").
        scheme: name of the scheme ("w4a8"), or the dtype of the weights of a float module.
        kernel: name of the kernel that runs it, "" for a float module.
        shape: of the float weight.
        bytes_before: bytes of the float parameters and buffers, shared ones counted once.
        bytes_after: bytes of what the module holds now, shared tensors counted once.
        converted: whether lowbit runs it.
        removed: whether it was a batch norm and is now part of a layer.
        note: why it stayed float, or what to know about the conversion.
    """

    name: str
    kind: str
    scheme: str
    kernel: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    converted: bool
    note: str = ""
    removed: bool = False


@dataclass(frozen=True)
class Report:
    """Rows in the order of the model, and the bytes of what has no row (norms, buffers)."""

    rows: tuple[Row, ...]
    other_bytes: int = 0

    @property
    def converted(self) -> tuple[Row, ...]:
        """Rows of the layers that lowbit runs."""
        return tuple(row for row in self.rows if row.converted)

    @property
    def kept(self) -> tuple[Row, ...]:
        """Rows of the modules that stayed float."""
        return tuple(row for row in self.rows if not (row.converted or row.removed))

    @property
    def folded(self) -> tuple[Row, ...]:
        """Rows of the batch norms that are part of a layer now."""
        return tuple(row for row in self.rows if row.removed)

    @property
    def bytes_before(self) -> int:
        """Bytes of all parameters and buffers of the float model."""
        return sum(row.bytes_before for row in self.rows) + self.other_bytes

    @property
    def bytes_after(self) -> int:
        """Bytes of all parameters and buffers now."""
        return sum(row.bytes_after for row in self.rows) + self.other_bytes

    @property
    def ratio(self) -> float:
        """`bytes_before / bytes_after`; 1.0 for a model without tensors."""
        return self.bytes_before / self.bytes_after if self.bytes_after else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The rows and totals as plain JSON types."""
        return {
            "layers": [asdict(row) | {"shape": list(row.shape)} for row in self.rows],
            "converted": len(self.converted),
            "kept": len(self.kept),
            "folded": len(self.folded),
            "other_bytes": self.other_bytes,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "ratio": self.ratio,
        }

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table with totals. Notes and kernels have numbers and letters, told below the table."""
        notes: dict[str, int] = {}
        kernels: dict[str, str] = {}
        cells = []
        for row in self.rows:
            if row.note:
                notes.setdefault(row.note, len(notes) + 1)
            if row.kernel:
                kernels.setdefault(row.kernel, _letter(len(kernels)))
            cells.append(
                [
                    _wrap(row.name, _NAME_WIDTH),
                    _wrap(row.kind, _KIND_WIDTH),
                    "x".join(map(str, row.shape)),
                    row.scheme,
                    kernels.get(row.kernel, ""),
                    size_text(row.bytes_before),
                    size_text(row.bytes_after),
                    notes.get(row.note, ""),
                ]
            )
        table = tabulate(
            cells,
            headers=["layer", "class", "weight", "scheme", "kernel", "before", "after", "note"],
            colalign=("left",) * 5 + ("right",) * 3 if cells else None,
            disable_numparse=True,
        )
        lines = [table, ""]
        folded = f", batch norms folded: {len(self.folded)}" if self.folded else ""
        lines += [f"[{letter}] {kernel}" for kernel, letter in kernels.items()]
        lines += [f"[{number}] {note}" for note, number in notes.items()]
        lines += [
            f"{len(self.converted)} converted, {len(self.kept)} kept float{folded}; "
            f"other parameters and buffers: {size_text(self.other_bytes)}",
            f"total: {size_text(self.bytes_before)} -> {size_text(self.bytes_after)} "
            f"({self.ratio:.2f}x smaller)",
        ]
        return "\n".join(lines)


def summary(model: nn.Module) -> Report:
    """The account of a model as it is now, converted or not.

    Args:
        model: any module.

    Returns:
        A row for every name of a module that lowbit runs, of every other module that holds a
        parameter of two or more dimensions, and of every batch norm that was to be folded. A module
        with several names has its bytes in the row of the first; the rows of the others say so.
    """
    check_model(model)
    counted: set[tuple[int, ...]] = set()
    first_name: dict[int, str] = {}
    rows = []
    for name, module, _ in walk(model, stop=is_unit):
        if not (is_converted(module) or holds_weights(module) or is_norm(module)):
            continue
        name = name or ROOT
        if id(module) in first_name:
            note = f"the same module as '{first_name[id(module)]}'"
            rows.append(_row(name, module, 0, 0, note))
            continue
        first_name[id(module)] = name
        after = count_bytes(own_tensors(module), counted)
        entry = entry_of(module)
        if entry is not None:
            before = entry.bytes_before
        elif is_converted(module):
            before = _float_bytes(module)
        else:
            before = after
        notes = (entry.note, entry.folded) if entry else ()
        rows.append(_row(name, module, before, after, "; ".join(filter(None, notes))))
    other = count_bytes([*model.parameters(), *model.buffers()], counted)
    return Report(tuple(rows), other)


def walk(
    model: nn.Module, stop: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
    """Yield (name, module, parent) in order, once for every name of a module.

    Args:
        model: the root, whose name is "".
        stop: asked after a module was yielded; True leaves its children out.
    """

    def visit(
        name: str, module: nn.Module, parent: nn.Module | None
    ) -> Iterator[tuple[str, nn.Module, nn.Module | None]]:
        yield name, module, parent
        if stop(module):
            return
        for key, child in module._modules.items():
            if child is not None:
                yield from visit(f"{name}.{key}" if name else key, child, module)

    return visit("", model, None)


def entry_of(module: nn.Module) -> Entry | None:
    """What the conversion left on this module, if anything."""
    state = getattr(module, _ENTRY, None)
    return Entry(**state) if isinstance(state, dict) else None


def set_entry(module: nn.Module, entry: Entry) -> None:
    """Leave the account of this module on it."""
    # Not nn.Module.__setattr__: ScriptModules and modules with their own refuse unknown names. As
    # a dict, so that torch.load(weights_only=True) has one class less to be told about.
    object.__setattr__(module, _ENTRY, dict(vars(entry)))


def is_converted(module: nn.Module) -> bool:
    """Whether lowbit runs this module: a lowbit layer, or what a converter returned."""
    entry = entry_of(module)
    return isinstance(module, LowbitLayer) or (entry is not None and entry.scheme is not None)


def is_unit(module: nn.Module) -> bool:
    """Whether a module is accounted for as a whole, its children included."""
    return is_converted(module) or (isinstance(module, FLOAT_CLASSES) and is_parametrized(module))


def holds_weights(module: nn.Module) -> bool:
    """Whether a float module has weights of its own: a parameter of two or more dimensions."""
    if isinstance(module, FLOAT_CLASSES):
        return True
    return any(is_lazy(p) or p.dim() >= 2 for p in module._parameters.values() if p is not None)


def is_norm(module: nn.Module) -> bool:
    """Whether this is a batch norm that was to be folded, or the place of one that was.

    The place of an activation, whose entry has no shape, is none: the layer's row tells of it.
    """
    entry = entry_of(module)
    return isinstance(module, (_BatchNorm, nn.Identity)) and entry is not None and entry.shape != ()


def own_tensors(module: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers of a module; those of its children only where it is a unit."""
    recurse = is_unit(module)
    return [*module.parameters(recurse=recurse), *module.buffers(recurse=recurse)]


def count_bytes(tensors: list[torch.Tensor], counted: set[tuple[int, ...]]) -> int:
    """Bytes of the tensors that are not in `counted` yet; adds them to it."""
    total = 0
    for tensor in tensors:
        if is_lazy(tensor):
            continue
        # Memory, not the object: buffers that were loaded as one tensor are one.
        key: tuple[int, ...] = (id(tensor),)
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
            key = (tensor.data_ptr(), tensor.nbytes)
        if key not in counted:
            counted.add(key)
            total += tensor.nbytes
    return total


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the float weight: of the largest parameter where there are several."""
    entry = entry_of(module)
    if entry is not None:
        return entry.shape
    if isinstance(module, LowbitLayer):
        return module.weight_shape
    weights = [p for p in module.parameters(recurse=is_unit(module)) if not is_lazy(p)]
    return tuple(max(weights, key=torch.numel).shape) if weights else ()


def lowbit_layers(module: nn.Module) -> list[QuantizedLayer]:
    """The packed weights of a converted module: itself, its parts, or what a converter returned."""
    return [m for m in module.modules() if isinstance(m, QuantizedLayer)]


def _row(name: str, module: nn.Module, before: int, after: int, note: str) -> Row:
    entry = entry_of(module)
    converted = is_converted(module)
    kernel = ""
    if converted:
        schemes = [layer.scheme for layer in lowbit_layers(module)]
        if not schemes and entry is not None and entry.scheme is not None:
            schemes = [entry.scheme]
        scheme = ", ".join(dict.fromkeys(s.name for s in schemes))
        kernel = ", ".join(
            dict.fromkeys(
                _core.kernel_name(layer.scheme.weight, layer.scheme.activation)
                for layer in lowbit_layers(module)
            )
        )
    else:
        least = 1 if is_norm(module) else 2
        dtypes = [p.dtype for p in own_tensors(module) if is_lazy(p) or p.dim() >= least]
        scheme = ", ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes)) or "float"
        if isinstance(module, nn.Identity):
            scheme = "folded"
    return Row(
        name=name,
        kind=entry.kind if entry else type(module).__name__,
        scheme=scheme,
        kernel=kernel,
        shape=weight_shape(module),
        bytes_before=before,
        bytes_after=after,
        converted=converted,
        note=note,
        removed=isinstance(module, nn.Identity) and entry is not None,
    )


def _float_bytes(module: nn.Module) -> int:
    """Bytes of the float32 layer, for a lowbit layer that was not converted from one."""
    bias = getattr(module, "bias", None)
    return 4 * (torch.Size(weight_shape(module)).numel() + (0 if bias is None else bias.numel()))


def size_text(count: int) -> str:
    """Bytes with a decimal unit, as budgets and comparisons have them: "12.3 MB"."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:  # what would be printed as 1000.0
        size /= 1000
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def _letter(index: int) -> str:
    """a, b, ... z, aa, ab, ..."""
    rest, last = divmod(index, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("a") + last)


def _wrap(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken behind dots where there are any."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        for piece in (part[i : i + width] for i in range(0, len(part), width)):
            if len(lines[-1]) + len(piece) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(lines)
