"""The programs of a segment for inputs of one size, and what the kernels refuse beside them.

A step that is refused (`csrc/step_check.cpp` says which are) is a part of its own: it takes and
returns floats, and torch or the layer itself computes it, with the same bits as a program would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.static.lowering import Lookup, Lowered, Size, lower
from lowbit.static.node import Node
from lowbit.static.stages import Segment, make_stages

_REFUSED = re.compile(r"(step|value) (\d+)[^:]*: (.*)", re.DOTALL)


@dataclass
class Part:
    """One program.

    Attributes:
        core: what runs it; None: `eager.run` does.
        released: names of the values that no later part takes.
    """

    lowered: Lowered
    core: Any | None
    released: tuple[str, ...]


@dataclass
class Plan:
    """A segment for inputs of one size: usually one part.

    Attributes:
        refused: names of the nodes that are parts of their own, and what the kernels say to them.
    """

    parts: list[Part]
    refused: dict[str, str]

    def is_current(self) -> bool:
        """Whether the layers still have the tensors that the parts refer to."""
        return all(part.lowered.program.is_current() for part in self.parts)


def make_plan(
    segment: Segment,
    inputs: Mapping[str, tuple[str, tuple[int, ...]]],
    lookup: Lookup,
    make: Callable[..., Any],
) -> Plan:
    """The parts of a segment, in order.

    Args:
        inputs: layout and shape [N, ...] of each value that it takes.
        lookup: the network.
        make: `_core.Program`.

    Raises:
        ValueError: the sizes do not fit: the message names the node.
    """
    refused: dict[str, str] = {}
    while True:
        parts, more = _parts(segment, inputs, lookup, make, refused)
        if not more:
            return Plan(parts, refused)
        refused |= more


def _parts(
    segment: Segment,
    inputs: Mapping[str, tuple[str, tuple[int, ...]]],
    lookup: Lookup,
    make: Callable[..., Any],
    refused: Mapping[str, str],
) -> tuple[list[Part], dict[str, str]]:
    """The parts; or what is refused beside what already was."""
    given = [Node(name, "input") for name in inputs]
    layouts = {node.name: node.layout for node in segment.nodes}
    known, flattened = dict(inputs), dict[str, Size]()
    parts = []
    for part in make_stages([*given, *segment.nodes], segment.outputs, refused):
        taken = {name: known[name] for name in part.inputs}
        lowered = lower(part.nodes, taken, part.outputs, lookup, flattened)
        core = None
        if part.nodes[0].name not in refused:
            try:
                core = make(*lowered.program.arguments())
            except ValueError as error:
                return [], _refused_nodes(error, lowered, part)
        parts.append(Part(lowered, core, part.released))
        flattened |= lowered.flattened
        for name, shape in zip(lowered.outputs, lowered.shapes, strict=True):
            known[name] = layouts[name], (1, *shape)
    return parts, {}


def _refused_nodes(error: ValueError, lowered: Lowered, part: Segment) -> dict[str, str]:
    """The nodes that an error of the kernels is about: of a step, or of what makes a value."""
    found = _REFUSED.match(str(error))
    if found is None:
        raise error
    program, position, reason = lowered.program, int(found[2]), found[3]
    if found[1] == "value":
        makes = (i for i, step in enumerate(program.steps) if step.get("to", -1) == position)
        position = next(makes)
    name = program.names[position]
    own = {node.name for node in part.nodes}
    if name in own:
        return {name: reason}
    # An input's codes are refused: whoever takes them takes floats.
    return {node.name: reason for node in part.nodes if name in node.inputs}
