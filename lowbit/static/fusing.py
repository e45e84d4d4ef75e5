"""Which nodes one step computes: padding, residual and activation go into the layer."""

from __future__ import annotations

from collections.abc import Collection

from lowbit.static.node import Node


def fuse_nodes(nodes: list[Node], outputs: Collection[str]) -> list[Node]:
    """Fuses what is used nowhere else, and leaves out what nothing uses.

    A fused node stands where its last part stood, and has that part's name.

    Args:
        nodes: in order.
        outputs: names of the values that leave the network.
    """
    graph = _Fusing(nodes, outputs)
    graph.drop_unused()
    for name in list(graph.nodes):
        node = graph.nodes.get(name)
        if node is not None and node.kind == "layer":
            graph.take_padding(node)
    for name in list(graph.nodes):
        node = graph.nodes.get(name)
        if node is not None and node.kind == "add":
            graph.give_to_layer(node)
    for name in list(graph.nodes):
        node = graph.nodes.get(name)
        if node is not None and node.kind == "unary":
            graph.give_activation(node)
    graph.leave_to_float()
    graph.keep_order_of_features()
    graph.drop_unused()
    return list(graph.nodes.values())


class _Fusing:
    def __init__(self, nodes: list[Node], outputs: Collection[str]) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.outputs = set(outputs)

    def users(self, name: str) -> list[Node]:
        return [node for node in self.nodes.values() if name in node.inputs]

    def only_user(self, name: str) -> Node | None:
        """The one node that uses a value, once."""
        users = self.users(name)
        if name in self.outputs or len(users) != 1 or users[0].inputs.count(name) != 1:
            return None
        return users[0]

    def take_padding(self, layer: Node) -> None:
        """Zeros around a convolution's input cost nothing as its own padding."""
        before = self.nodes[layer.inputs[0]]
        sides = before.settings.get("pad")
        if before.kind == "pad" and before.settings["value"] == 0:
            sides = before.settings["sides"]
        if sides is None or layer.layout != "nchw" or self.only_user(before.name) is not layer:
            return
        if not _has_room(layer, sides):
            return
        source = self.nodes[before.inputs[0]]
        if not source.layout:
            source.layout = "nchw"
        if source.layout != "nchw":
            return
        layer.settings["sides"] = sides
        layer.inputs = before.inputs
        layer.fused = (*before.fused, *layer.fused)
        del self.nodes[before.name]

    def give_to_layer(self, add: Node) -> None:
        """A layer adds what its output alone is added to; the later one of two."""
        order = list(self.nodes)
        for name in sorted(set(add.inputs), key=order.index, reverse=True):
            layer = self.nodes[name]
            plain = layer.kind == "layer" and len(layer.inputs) == 1
            if plain and self.only_user(name) is add and layer.layout == add.layout:
                (other,) = (value for value in add.inputs if value != name)
                self._move(layer, add, (layer.inputs[0], other))
                return

    def give_activation(self, unary: Node) -> None:
        """Layers compute any function of their outputs, sums those that kernels know."""
        before = self.nodes[unary.inputs[0]]
        function = unary.settings["function"]
        takes = before.kind == "layer" or (before.kind == "add" and function.epilogue is not None)
        if not takes or before.settings.get("function") is not None:
            return
        if self.only_user(before.name) is not unary:
            return
        if function.epilogue is None and not self._wanted_as_codes(unary.name):
            return  # a table gives codes; a float of the layer's is nearer
        before.settings["function"] = function
        self._move(before, unary, before.inputs)

    def leave_to_float(self) -> None:
        """A function at the end is computed from floats, which are nearer."""
        for node in reversed(list(self.nodes.values())):
            if node.kind != "unary" or self._wanted_as_codes(node.name):
                continue
            if self.nodes[node.inputs[0]].kind == "layer":
                node.kind, node.reason = "float", "nothing takes its codes"

    def keep_order_of_features(self) -> None:
        """Features flattened from codes [H, W, C] are in torch's order for layers alone.

        A layer's weight can be reordered; for anything else the flattening is done in float.
        """
        for node in reversed(list(self.nodes.values())):
            if node.layout == "flat" and not (
                node.name not in self.outputs and all(u.in_integers for u in self.users(node.name))
            ):
                node.kind, node.reason = "float", "flattened for more than layers"
                node.layout = "nc"
        for node in self.nodes.values():
            before = [self.nodes[name] for name in node.inputs]
            origin = node.kind == "view" and before[0].layout == "nchw"
            if node.layout == "flat" and not origin and any(b.layout != "flat" for b in before):
                node.layout = "nc"
            if node.kind == "layer" and before[0].layout != "flat":
                node.settings.pop("flattened", None)

    def drop_unused(self) -> None:
        for node in reversed(list(self.nodes.values())):
            used = self.outputs.union(*(other.inputs for other in self.nodes.values()))
            if node.kind != "input" and node.name not in used:
                del self.nodes[node.name]

    def _wanted_as_codes(self, name: str) -> bool:
        return any(user.in_integers for user in self.users(name))

    def _move(self, node: Node, last: Node, inputs: tuple[str, ...]) -> None:
        """Lets a node compute what follows it, in the place of that."""
        fused = (*node.fused, *last.fused)
        moved = Node(
            last.name,
            node.kind,
            inputs,
            node.settings,
            last.layout,
            last.shape,
            last.dtype,
            fused,
        )
        self.nodes = {
            name: moved if name == last.name else other
            for name, other in self.nodes.items()
            if name != node.name
        }


def _has_room(layer: Node, sides: tuple[int, int, int, int]) -> bool:
    """Whether no window would lie beyond the image: programs take no such padding."""
    left, right, top, bottom = sides
    room = layer.settings.get("room")
    return room is not None and all(
        own + after <= max(reach, own + before)
        for (reach, own), before, after in zip(room, (top, left), (bottom, right), strict=True)
    )
