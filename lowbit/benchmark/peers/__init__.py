"""The engines that `lowbit bench` races against, one file each.

To add a peer, write a file that defines `PEER` and add it to the tuple below. A peer whose packages
are not installed is named as missing in the results, never left out in silence.
"""

from __future__ import annotations

from lowbit.benchmark.peers import (
    onnxruntime_int8,
    onnxruntime_nbits,
    openvino_compressed,
    torch_float32,
    torch_int8,
)
from lowbit.benchmark.peers.peer import Peer

PEERS: dict[str, Peer] = {
    module.PEER.name: module.PEER
    for module in (
        torch_float32,
        torch_int8,
        onnxruntime_int8,
        onnxruntime_nbits,
        openvino_compressed,
    )
}

__all__ = ["PEERS", "Peer"]
