"""What the quantized layers share: buffers, state dict, moves between devices, error messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit import _core
from lowbit.formats import FORMATS
from lowbit.inputs import runs_directly
from lowbit.nn.floats import FLOAT_EPILOGUES, autocast
from lowbit.nn.layer import DequantizedWeight, LowbitLayer, is_compiling
from lowbit.nn.loading import format_version, state_problems
from lowbit.packed import (
    ACTIVATION_NAMES,
    DYNAMIC,
    NAMES,
    ActivationTensors,
    PackedWeight,
    Tensors,
    activation_problem,
    move_to_huge_pages,
    pack_groups,
    tensor_shapes,
    tensor_version,
    unpack_groups,
)
from lowbit.quantizers import QuantizedWeight, dequantize_weight
from lowbit.schemes import Scheme

_BUFFERS = (
    "weight_packed",
    "weight_scale",
    "format_version",
    *ACTIVATION_NAMES,
    "bias",
    "weight_group_scale",
    "weight_group_zero",
)


class QuantizedLayer(LowbitLayer):
    """A layer whose weights are packed codes. Subclasses say how the weight is laid out.

    The state dict is plain tensors, the very operands of the kernels:

        weight_packed       uint8 [panels, steps, 64]
        weight_scale        float32 [N]
        weight_group_scale  float16 [ceil(N/16), G, 16], with groups only
        weight_group_zero   the same, where an imported checkpoint has zero points
        bias                float32 [N], or absent
        format_version      int32 [5]: layout version, bits, mul, add, group size (0 without)
        activation_scale    float32 [], with a static scheme only; 0: not calibrated yet
        activation_zero     int32 [], likewise

    Attributes:
        weight_dtype: dtype of the float layer's weight: of `weight` and of `dequantize()`. Moves
            to another dtype change this alone; the buffers keep theirs.
        epilogue: what the layer computes from its float32 outputs, bias included: "none", "relu",
            "relu6" or "hardswish", with the bits of torch's float32 functions. Converting sets it
            where one of these follows the layer; it may be set at any time, and is no part of the
            state dict.
    """

    weight_dtype: torch.dtype
    epilogue: str = "none"
    weight_packed: Tensor
    weight_scale: Tensor
    weight_group_scale: Tensor | None
    weight_group_zero: Tensor | None
    bias: Tensor | None
    format_version: Tensor
    activation_scale: Tensor
    activation_zero: Tensor

    # The operands as last checked, and the call prepared with them. They are not state: never
    # copied, pickled or shared.
    _checked: PackedWeight | None = None
    _direct: _core.Direct | None = None

    def _create_buffers(
        self,
        scheme: Scheme,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Buffers of a weight that is zero: scales 0."""
        self.scheme = scheme
        self.epilogue = "none"
        self.weight_dtype = dtype or torch.get_default_dtype()
        if not self.weight_dtype.is_floating_point:
            raise ValueError(f"{self.label}: dtype {dtype} is no floating-point dtype")
        shapes = tensor_shapes(self._layout(), scheme.weight, scheme.group_size or 0, scheme.static)
        version = torch.tensor(format_version(scheme), dtype=torch.int32, device=device)
        # Those that may be None come last: torch.export of a bare layer counts them wrongly.
        for name in _BUFFERS:
            if name in ACTIVATION_NAMES and not scheme.static:
                continue
            tensor = None
            if name == "format_version":
                tensor = version
            elif name in shapes and name != "weight_group_zero" and (bias or name != "bias"):
                shape, buffer_dtype = shapes[name]
                tensor = torch.zeros(shape, dtype=buffer_dtype, device=device)
            self.register_buffer(name, tensor)

    def _layout(self) -> tuple[int, int, int]:
        """Blocks that are packed one by one, rows of each, and K."""
        raise NotImplementedError

    @property
    def packed_bytes(self) -> int:
        """Bytes that the layer's tensors take, in memory as in a file."""
        return sum(buffer.nbytes for buffer in self._buffers.values() if buffer is not None)

    def _device(self) -> torch.device:
        return self.weight_packed.device

    def _matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """Weights [N, K] of the packed layout in the shape of the float layer's weight."""
        raise NotImplementedError

    def _check_operands(
        self, tensors: Tensors, activation: ActivationTensors = DYNAMIC
    ) -> PackedWeight:
        raise NotImplementedError

    def _activation_tensors(self) -> ActivationTensors:
        if not self.scheme.static:
            return DYNAMIC
        return self.activation_scale, self.activation_zero

    def set_activation(self, scale: float, zero: int = 0) -> None:
        if not self.scheme.static:
            raise ValueError(
                f"{self.label}: its scheme {self.scheme.name} quantizes activations as they come; "
                "build it with a static one"
            )
        device = self.activation_scale.device
        if isinstance(zero, bool) or int(zero) != zero:
            raise ValueError(f"{self.label}: activation_zero {zero!r} must be an integer")
        rounded = torch.tensor(float(scale), dtype=torch.float32)
        problem = activation_problem(float(rounded), int(zero), self.scheme.activation)
        if problem:
            raise ValueError(f"{self.label}: {problem}")
        # New tensors: layers that were converted from one weight may share equal ones.
        self.activation_scale = rounded.to(device)
        self.activation_zero = torch.tensor(int(zero), dtype=torch.int32, device=device)

    @property
    def weight(self) -> Tensor:
        """The weights that the codes mean, in the float layer's shape and dtype.

        Computed anew at each access, which takes time and memory; the layer itself never does.
        """
        with torch.no_grad():
            if self.weight_packed.is_meta:
                blocks, rows, depth = self._layout()
                matrix = torch.empty(blocks * rows, depth, device="meta")
            else:
                matrix = dequantize_weight(self.quantized_weight())
            weight = self._matrix_to_weight(matrix)
            weight = weight.to(device=self.weight_packed.device, dtype=self.weight_dtype)
            return weight.as_subclass(DequantizedWeight)

    def _dequantized(self, layer: nn.Module) -> nn.Module:
        """A float layer of this one's sizes, with what the codes mean as its weights.

        Returns:
            The layer; where there is an epilogue, an `nn.Sequential` of the layer and that.
        """
        layer.weight = nn.Parameter(self.weight.as_subclass(Tensor))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.to(self.weight_dtype, copy=True))
        if self.epilogue != "none":
            layer = nn.Sequential(layer, FLOAT_EPILOGUES[self.epilogue]())
        return layer.train(self.training)

    def extra_repr(self) -> str:
        epilogue = "" if self.epilogue == "none" else f", epilogue={self.epilogue}"
        return super().extra_repr() + epilogue

    def quantized_weight(self) -> QuantizedWeight:
        """Codes and scales of the weight as a matrix [N, K], K as in the packed layout."""
        blocks, rows, depth = self._layout()
        codes = torch.empty(blocks * rows, depth, dtype=torch.uint8, device="cpu")
        if blocks:
            parts = self.weight_packed.cpu().chunk(blocks)
            for part, block in zip(parts, codes.chunk(blocks), strict=False):
                block.copy_(
                    torch.from_numpy(_core.unpack(part.numpy(), self.scheme.weight, rows, depth))
                )
        group_scale, group_zero = (
            None if values is None else unpack_groups(values.cpu(), blocks, rows)
            for values in (self.weight_group_scale, self.weight_group_zero)
        )
        return QuantizedWeight(
            codes,
            self.weight_scale.cpu(),
            group_scale,
            group_zero,
            FORMATS[self.scheme.weight],
            self.scheme.group_size,
        )

    def set_quantized_weight(self, q: QuantizedWeight) -> None:
        """Packs codes and scales of a matrix [N, K], K as in the packed layout, into the layer.

        Raises:
            ValueError: they are of another format, group size or shape.
        """
        blocks, rows, depth = self._layout()
        wanted = (self.scheme.weight, self.scheme.group_size, (blocks * rows, depth))
        given = (q.format.name, q.group_size, tuple(q.codes.shape))
        if given != wanted:
            raise ValueError(
                f"{self.label}: takes weights of (format, group size, shape) {wanted}, not {given}"
            )
        packed = torch.empty_like(self.weight_packed, device="cpu")
        if packed.numel():
            parts = zip(q.codes.chunk(blocks), packed.chunk(blocks), strict=True)
            for codes, part in parts:
                array = _core.pack(codes.contiguous().numpy(), self.scheme.weight)
                part.copy_(torch.from_numpy(array))
        self.weight_packed = packed
        self.weight_scale = q.scale
        self.weight_group_scale, self.weight_group_zero = (
            None if values is None else pack_groups(values, blocks)
            for values in (q.group_scale, q.group_zero)
        )
        move_to_huge_pages((packed, self.weight_group_scale))

    # --- Forward -------------------------------------------------------------------------------

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for an input of a shape and dtype that the class names.

        Raises:
            TypeError, ValueError, RuntimeError: an input that no float layer would take either,
                or that is not on the CPU, or that wants gradients while the layer is training.
        """
        if is_compiling():
            return self._dispatch(input)
        direct = self._direct
        if direct is not None:
            y = direct(input, self.__dict__)
            if y is not None:
                return y
        if not runs_directly(input):
            return self._dispatch(input)
        if input.requires_grad:
            self._refuse_training(input)
            input = input.detach()
        return self._run(input, self._operands())

    def _run(self, x: Tensor, w: PackedWeight) -> Tensor:
        """The output for an ordinary CPU tensor, without the dispatcher."""
        raise NotImplementedError

    def _dispatch(self, x: Any) -> Tensor:
        """The same through the dispatcher."""
        raise NotImplementedError

    def _prepare(self, w: PackedWeight) -> _core.Direct | None:
        """The call that forward tries first."""
        raise NotImplementedError

    def _call_operator(self, operator: Callable[..., Tensor], x: Any, *sizes: Any) -> Tensor:
        """Calls an operator of `torch.ops.lowbit` with the layer's operands."""
        formats = self.scheme.weight, self.scheme.activation
        fixed = self._activation_tensors() if self.scheme.static else ()
        self._refuse_uncalibrated()
        return autocast(operator(x, *self.operator_tensors(), *formats, *sizes, *fixed))

    def operator_tensors(self) -> Tensors:
        """The layer's tensors in the order of the operators' arguments."""
        return (
            self.weight_packed,
            self.weight_scale,
            self.weight_group_scale,
            self.weight_group_zero,
            self.bias,
        )

    def _operands(self) -> PackedWeight:
        """The checked operands; checked again if a tensor or its memory is another one."""
        checked, direct = self._checked, self._direct
        if checked is not None and (
            self._is_current(checked) if direct is None else direct.matches(self.__dict__)
        ):
            return checked
        checked = self._check_operands(self.operator_tensors(), self._activation_tensors())
        move_to_huge_pages(checked.tensors)
        self.__dict__["_checked"] = checked
        self.__dict__["_direct"] = self._prepare(checked)
        return checked

    def _is_current(self, checked: PackedWeight) -> bool:
        """Whether the operands are those that were checked, where no prepared call can tell."""
        if self._parameters:  # one of the tensors may have become one
            return False
        if self.epilogue != _core.EPILOGUES[checked.epilogue]:
            return False
        buffers = self._buffers
        for name, tensor, address in zip(NAMES, checked.tensors, checked.addresses, strict=True):
            if buffers.get(name) is not tensor or (
                tensor is not None and tensor.data_ptr() != address
            ):
                return False
        return self._is_current_activation(checked)

    def _is_current_activation(self, checked: PackedWeight) -> bool:
        fixed = checked.fixed
        if fixed is None:
            return not self.scheme.static
        scale, zero = self._activation_tensors()
        if scale is not fixed.tensors[0] or zero is not fixed.tensors[1]:
            return False
        if (float(fixed.tensors[0]), int(fixed.tensors[1])) != (fixed.scale, fixed.zero):
            return False
        return fixed.bias is None or fixed.versions == tuple(map(tensor_version, checked.tensors))

    # --- State ---------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads the tensors if they are of this layer's format, and refuses them otherwise."""
        problems = state_problems(state_dict, prefix, self._layout(), self.scheme)
        if problems:
            error_msgs.extend(f"{self.label} (keys '{prefix}...'): {text}" for text in problems)
            return
        if f"{prefix}weight_packed" in state_dict:
            # Zero points are the checkpoint's: there are as many as it has.
            zero = state_dict.get(f"{prefix}weight_group_zero")
            if zero is None:
                self.weight_group_zero = None
            elif self.weight_group_zero is None:
                self.weight_group_zero = torch.empty_like(zero, device=self.weight_scale.device)
            # What is made of the weights is made anew, also where torch does not count writes.
            self.__dict__["_checked"] = self.__dict__["_direct"] = None
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLayer:
        """Moves between devices; a change of dtype is remembered for `weight`, no more."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        probe = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_packed.device))
        if probe.is_floating_point():
            self.weight_dtype = probe.dtype
        if recurse:
            for child in self.children():
                child._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(keep_dtype, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_checked", None)
        state.pop("_direct", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        version = state["_buffers"]["format_version"]
        if type(version) is Tensor and not version.is_meta:
            found = int(version[0])
            if found != _core.LAYOUT_VERSION:
                raise RuntimeError(
                    f"a pickled lowbit.nn.{type(self).__name__} has layout version {found}, but "
                    f"this lowbit reads version {_core.LAYOUT_VERSION}; convert the float model "
                    "again, or use the lowbit that wrote it"
                )
        state = {"epilogue": "none", **state}  # prepared calls look for it on the instance
        super().__setstate__(state)  # type: ignore[no-untyped-call]
