"""The C++ extension. Addresses are integers (`Tensor.data_ptr()`), 0 where there is none.

Everything that can be checked is, and raises ValueError; that an address is valid cannot.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

class _Isa(TypedDict):
    name: str
    usable: bool
    kernels: dict[str, str]

FORMATS: dict[str, tuple[int, int, int]]  # name -> bits, mul, add
ACTIVATIONS: tuple[str, ...]
EPILOGUES: tuple[str, ...]  # the first is "none"
LAYOUT_VERSION: int

def cpu_features() -> dict[str, bool]: ...
def isas() -> list[_Isa]: ...  # best first
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def kernel_name(format: str, activation: str) -> str: ...
def build_info() -> dict[str, Any]: ...
def openmp_threads() -> int: ...

# codes [N, K] <-> packed [ceil(N/16), steps, 64]
def pack(codes: NDArray[np.uint8], format: str) -> NDArray[np.uint8]: ...
def unpack(packed: NDArray[np.uint8], format: str, n: int, k: int) -> NDArray[np.uint8]: ...
def padding_is_zero(packed: NDArray[np.uint8], format: str, n: int, k: int) -> bool: ...
def tap_channels(format: str, channels_per_group: int) -> int: ...
def conv2d_blocks(out_channels: int, groups: int) -> int: ...
def move_to_huge_pages(memory: int, bytes: int) -> int: ...

# x float32 [m, k], y float32 [m, n]; format, activation and epilogue are indices in
# FORMATS, ACTIVATIONS and EPILOGUES; an activation_scale of 0: each row (image) has its own
def linear(
    x: int,
    m: int,
    y: int,
    format: int,
    activation: int,
    n: int,
    k: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
    threads: int,
    epilogue: int = ...,
    activation_scale: float = ...,
    activation_zero: int = ...,
) -> None: ...

# x and y float32 NHWC; geometry = batch, height, width, channels, out_channels, out_height,
# out_width, kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w,
# groups
def conv2d(
    x: int,
    y: int,
    geometry: tuple[int, ...],
    format: int,
    activation: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
    threads: int,
    x_channels_last: bool = ...,
    y_channels_last: bool = ...,
    epilogue: int = ...,
    activation_scale: float = ...,
    activation_zero: int = ...,
) -> None: ...

# What `linear` and `conv2d` add in place of the bias where activations have a zero point: float32
# [n] to out. Of the geometry nothing but channels, out_channels, kernel and groups counts.
def linear_static_bias(
    out: int,
    activation_scale: float,
    activation_zero: int,
    threads: int,
    format: int,
    activation: int,
    n: int,
    k: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
) -> None: ...
def conv2d_static_bias(
    out: int,
    activation_scale: float,
    activation_zero: int,
    threads: int,
    geometry: tuple[int, ...],
    format: int,
    activation: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
) -> None: ...

# A layer's prepared call (lowbit.direct): the output, or None where it declines. With an
# activation_scale, three tensors follow the operands: both parameters, and the static bias or None.
class Direct:
    def __call__(self, x: object, attributes: dict[str, Any], /) -> Tensor | None: ...
    def matches(self, attributes: dict[str, Any], /) -> bool: ...

# False: this torch lacks what prepared calls need.
def bind_torch(
    tensor_type: type,
    parameter_type: type,
    float32: torch.dtype,
    get_num_threads: Callable[[], int],
    questions: tuple[Callable[[], Any], ...],
) -> bool: ...
def direct_linear(
    tensors: tuple[Tensor | None, ...],
    settings: dict[str, Any],
    format: int,
    activation: int,
    n: int,
    k: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
    epilogue: int = ...,
    activation_scale: float = ...,
    activation_zero: int = ...,
) -> Direct: ...
def direct_conv2d(
    tensors: tuple[Tensor | None, ...],
    settings: dict[str, Any],
    geometry: tuple[int, ...],  # batch, height, width, out_height, out_width: any
    pad_bottom: int,
    pad_right: int,
    format: int,
    activation: int,
    group_size: int,
    packed: int,
    scale: int,
    group_scale: int,
    group_zero: int,
    bias: int,
    epilogue: int = ...,
    activation_scale: float = ...,
    activation_zero: int = ...,
) -> Direct: ...

# A network of codes: values (channels, height, width, scale, zero point), and steps, each "op" and
# its operands; weights are read where they are for as long as the program lives. Inputs and outputs
# are (address, channels last) of dense float32. ValueError says which step is wrong.
class Program:
    def __init__(
        self, values: Sequence[tuple[int, int, int, float, int]], steps: Sequence[dict[str, Any]]
    ) -> None: ...
    def run(
        self,
        inputs: Sequence[tuple[int, bool]],
        outputs: Sequence[tuple[int, bool]],
        batch: int,
        threads: int,
    ) -> None: ...
    # Runs, and returns each step's operation and seconds, on the first thread.
    def profile(
        self,
        inputs: Sequence[tuple[int, bool]],
        outputs: Sequence[tuple[int, bool]],
        batch: int,
        threads: int,
    ) -> list[tuple[str, float]]: ...
    @property
    def arena_bytes(self) -> int: ...  # of the codes of one image

def fit_scales(
    x: int,
    mask: int,
    units: int,
    masks: int,
    length: int,
    scale: int,
    format: int,
    low: int,
    high: int,
    out: int,
    threads: int,
) -> None: ...
def probe(  # MAC/s of one core
    what: Literal["dot", "dot8", "dot4", "dot2", "dot1", "fma", "xnor"], seconds: float
) -> float: ...
def read_bandwidth(bytes: int, threads: int, seconds: float) -> float: ...  # bytes/s
