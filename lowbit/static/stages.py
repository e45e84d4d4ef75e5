"""A network's nodes as they run: segments in integers, float operations between."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from lowbit.static.node import Node


@dataclass
class Segment:
    """Nodes in integers that run as one program, or one float operation.

    Attributes:
        inputs: names of the float values that a program quantizes.
        outputs: names of its values that are wanted as floats.
        released: names of the values that nothing after it takes.
    """

    nodes: list[Node]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    released: tuple[str, ...] = field(default=())

    @property
    def in_integers(self) -> bool:
        return self.nodes[0].in_integers


def make_stages(
    nodes: Sequence[Node], outputs: Collection[str], apart: Collection[str] = ()
) -> list[Segment]:
    """As few segments as the order of the nodes allows.

    Args:
        outputs: names of the values that the network returns.
        apart: names of nodes in integers that are segments of their own.
    """
    waiting = [node for node in nodes if node.kind != "input"]
    done = {node.name for node in nodes if node.kind == "input"}
    groups: list[list[Node]] = []
    while waiting:
        alone = _ready(waiting, done, lambda node: not node.in_integers or node.name in apart)
        groups += [[node] for node in alone]
        integers = _ready(waiting, done, lambda node: node.in_integers and node.name not in apart)
        groups += _connected(integers)
    return _segments(groups, {node.name: node for node in nodes}, outputs)


def _ready(waiting: list[Node], done: set[str], fits: Callable[[Node], bool]) -> list[Node]:
    """Takes the nodes of one kind out of `waiting` that need no other kind first."""
    found = []
    for node in list(waiting):
        if fits(node) and done.issuperset(node.inputs):
            waiting.remove(node)
            done.add(node.name)
            found.append(node)
    return found


def _connected(nodes: list[Node]) -> list[list[Node]]:
    """Nodes in groups that have values in common: batches of others may be of another size."""
    groups: list[tuple[set[str], list[Node]]] = []
    for node in nodes:
        names, members = {node.name, *node.inputs}, [node]
        for other in [group for group in groups if group[0] & names]:
            groups.remove(other)
            names |= other[0]
            members = other[1] + members
        groups.append((names, members))
    order = {node.name: i for i, node in enumerate(nodes)}
    return [sorted(members, key=lambda node: order[node.name]) for _, members in groups]


def _segments(
    groups: list[list[Node]], nodes: dict[str, Node], outputs: Collection[str]
) -> list[Segment]:
    position = {node.name: i for i, group in enumerate(groups) for node in group}
    last = {name: len(groups) for name in outputs}
    for i, group in enumerate(groups):
        for node in group:
            for name in node.inputs:
                last[name] = max(last.get(name, i), i)
    segments = []
    for i, group in enumerate(groups):
        segment = Segment(group)
        if segment.in_integers:
            inside = {node.name for node in group}
            taken = dict.fromkeys(name for node in group for name in node.inputs)
            segment.inputs = tuple(name for name in taken if name not in inside)
            segment.outputs = tuple(node.name for node in group if last.get(node.name, i) > i)
        segment.released = tuple(
            name
            for name, end in last.items()
            if end == i and (name not in position or position[name] < i or not segment.in_integers)
        )
        segments.append(segment)
    return segments


def coded_values(nodes: Sequence[Node]) -> dict[str, str]:
    """The values that have codes, and whose observer says what they mean.

    A layer whose output nothing takes as codes writes floats, and has none.
    """
    taken = {name for node in nodes if node.in_integers for name in node.inputs}
    owners: dict[str, str] = {}
    for node in nodes:
        function = node.settings.get("function")
        table = node.kind == "layer" and function is not None and function.epilogue is None
        codes = node.in_integers and (node.kind != "layer" or table)
        if node.name not in taken and not codes:
            continue
        owners[node.name] = owners[node.inputs[0]] if node.keeps_codes else node.name
    for node in reversed(nodes):
        if node.kind == "concat":
            _join(node, nodes, owners)
    return owners


def _join(concat: Node, nodes: Sequence[Node], owners: dict[str, str]) -> None:
    """What is made for a concatenation alone has its codes at once: they are rounded only once."""
    uses = [name for node in nodes for name in node.inputs]
    for node in nodes:
        alone = node.name in concat.inputs and uses.count(node.name) == 1
        if alone and node.in_integers and not node.keeps_codes:
            owners[node.name] = owners[concat.name]
