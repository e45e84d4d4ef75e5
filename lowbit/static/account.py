"""What became of each call of a captured model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from lowbit.static.node import Node

NEVER_CALLED = "never called: it is not part of the network"


@dataclass(frozen=True)
class Row:
    """One call of the float model.

    Attributes:
        name: of the module that was called, else of torch.fx's node.
        operation: what computes it.
        where: "integers" or "float"; "nowhere" for a module that nothing uses.
        note: with what it is fused, or why it is float or left out.
    """

    name: str
    operation: str
    where: str
    note: str


@dataclass(frozen=True)
class Account:
    """Rows in the order of the computation; what is left out comes last."""

    rows: tuple[Row, ...]

    @property
    def in_integers(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.where == "integers")

    @property
    def in_float(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.where == "float")

    @property
    def left_out(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.where == "nowhere")

    def __str__(self) -> str:
        cells = [(row.name, row.operation, row.where, row.note) for row in self.rows]
        table = tabulate(cells, headers=("call", "operation", "runs in", "note"))
        left_out = f", {len(self.left_out)} left out" if self.left_out else ""
        totals = f"{len(self.in_integers)} in integers, {len(self.in_float)} in float{left_out}"
        return f"{table}\n\n{totals}"


def make_account(
    nodes: Sequence[Node],
    outputs: Collection[str],
    refused: Mapping[str, str],
    uncalled: Sequence[tuple[str, str]],
) -> Account:
    """The account of a network's nodes.

    Args:
        outputs: names of the values that the network returns.
        refused: reasons why nodes in integers are no steps of programs, by their names.
        uncalled: names and classes of modules that nothing uses.
    """
    taken = {name for node in nodes if node.in_integers for name in node.inputs}
    rows = []
    for node in nodes:
        if node.kind == "input":
            continue
        where = "integers" if node.in_integers and node.name not in refused else "float"
        operation = _operation(node)
        note = node.reason
        if node.kind == "layer" and node.name not in taken and node.name in outputs:
            note = "writes floats: they leave the network"
        if node.name in refused:
            note = refused_note(refused[node.name])
        *parts, last = node.fused or (node.name,)
        rows.append(Row(parts[0] if parts else last, operation, where, note))
        rows += [
            Row(part, operation, where, f"computed with '{parts[0]}'")
            for part in (*parts[1:], last)
            if parts
        ]
    rows += [Row(name, kind, "nowhere", NEVER_CALLED) for name, kind in uncalled]
    return Account(tuple(rows))


def refused_note(reason: str) -> str:
    """What is said of a node that the kernels refuse."""
    return f"runs by itself: no step takes it ({reason})"


def _operation(node: Node) -> str:
    if not node.in_integers:
        kind, target, *_ = node.settings["call"]
        return f"{kind} {target if isinstance(target, str) else target.__name__}"
    operation = str(node.settings.get("operation", node.kind))
    function = node.settings.get("function")
    if len(node.inputs) > 1 and node.kind == "layer":
        operation += " + residual"
    return operation if function is None else f"{operation}, {function}"
