"""The engines that `lowbit bench` races against, one file each.

To add a peer, write a file that defines `PEER` and add it to the tuple below. A peer whose packages
are not installed is named as missing in the results, never left out in silence.
"""

from __future__ import annotations

from lowbit.benchmark.peers import (
    ggml_linear,
    numkong_packed,
    onnxruntime_int8,
    onnxruntime_nbits,
    openvino_compressed,
    torch_bfloat16,
    torch_float32,
    torch_int8,
    torch_weight_only,
    zentorch_linear,
)
from lowbit.benchmark.peers.peer import Peer

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (
        torch_float32,
        torch_bfloat16,
        torch_int8,
        torch_weight_only,
        zentorch_linear,
        onnxruntime_int8,
        onnxruntime_nbits,
        openvino_compressed,
        ggml_linear,
        numkong_packed,
    )
}

__all__ = ["PEERS", "Peer"]
