"""The file itself: a safetensors file whose metadata tells how its layers were converted.

The metadata has one entry of ours, "lowbit", a JSON object:

    layout_version  of the packed weights, `_core.LAYOUT_VERSION`
    lowbit_version  of the package that wrote the file, for error messages
    layers          name of each converted layer -> its class and its scheme
    aliases         names in the state dict whose tensor is stored under another name
    epilogues       name of a layer that ends with an activation -> its epilogue; may be missing
    account         what `lowbit.summary` shows beside the tensors: float classes, reasons

Nothing in a file is imported, called or unpickled, and every type is checked.

The safetensors package would order tensors by dtype and name. Here those whose bytes are a multiple
of 64 come first and the header is padded, so that packed weights and most others lie on 64-byte
boundaries of the mapped file: kernels load whole cache lines, and torch's float kernels, whose last
bits can depend on alignment, see the alignment that torch's own memory has.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit import _core
from lowbit.report import Entry
from lowbit.schemes import Scheme

_KEY = "lowbit"
_ALIGNMENT = 64  # bytes: a cache line, and what torch aligns its own memory to

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class FileFormatError(ValueError):
    """A file that is damaged, not lowbit's, newer than this lowbit, or of another model."""


@dataclass
class File:
    """What a file holds.

    Attributes:
        path: for error messages.
        tensors: by name in the state dict; aliases are the same object.
        layers: name of a converted layer -> its class and its scheme.
        aliases: name -> the name under which its tensor is stored.
        epilogues: name of a lowbit layer -> its epilogue, where it has one.
        account: name of a module -> its entry for `lowbit.summary`, without the scheme.
        network: of a static network, what captures its float model again; else None.
    """

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, tuple[str, Scheme]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    epilogues: dict[str, str] = field(default_factory=dict)
    account: dict[str, Entry] = field(default_factory=dict)
    network: dict[str, Any] | None = None

    def error(self, message: str) -> FileFormatError:
        """An error about this file."""
        return FileFormatError(f"{self.path}: {message}")


def write_file(file: File, lowbit_version: str) -> None:
    """Write a file, whole or not at all; it may be one that `file.tensors` are mapped from.

    Raises:
        ValueError: a tensor that has no data, or a dtype that safetensors does not know.
        OSError: the file cannot be written.
    """
    target = Path(os.path.realpath(file.path))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {file.path}: no directory {target.parent}")
    stored = {name: file.tensors[name] for name in file.tensors if name not in file.aliases}
    order = sorted(
        stored,
        key=lambda name: (
            stored[name].nbytes % _ALIGNMENT != 0,
            -stored[name].element_size(),
            name,
        ),
    )
    header: dict[str, Any] = {
        "__metadata__": {"format": "pt", _KEY: json.dumps(_description(file, lowbit_version))}
    }
    offset = 0
    for name in order:
        tensor = stored[name]
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"'{name}' is on device '{tensor.device}', {tensor.layout}: no data")
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"'{name}' is {tensor.dtype}, which safetensors cannot hold")
        stop = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    # Beside the target, then renamed: a model that is mapped from the target keeps its old bytes.
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                # One at a time: nothing but a tensor that is not contiguous is copied.
                data = stored[name].detach().cpu().resolve_neg().resolve_conj().contiguous()
                stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str]) -> File:
    """Map a file's tensors, and read its description.

    Raises:
        FileFormatError: no safetensors file, a damaged one, one without our description, or one
            of a newer layout.
        OSError: the file cannot be read.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise IsADirectoryError(f"{name} is a directory, not a lowbit file")
    try:
        with safe_open(name, framework="pt", device="cpu") as handle:
            metadata = handle.metadata() or {}
            if _KEY not in metadata:
                raise FileFormatError(
                    f"{name}: no lowbit file (it has no '{_KEY}' metadata); load it into the float "
                    "model, convert that with lowbit.quantize and write it with lowbit.save_file"
                )
            file = _parse(name, metadata[_KEY])
            keys = list(handle.keys())
            file.tensors = {key: _aligned(handle.get_tensor(key)) for key in keys}
    except SafetensorError as error:
        raise FileFormatError(
            f"{name}: damaged, truncated, or no safetensors file ({error}); copy or write it again"
        ) from error
    for alias, stored in file.aliases.items():
        if stored not in file.tensors or alias in file.tensors:
            raise file.error(f"damaged: '{alias}' is said to share the tensor '{stored}'")
    file.tensors |= {alias: file.tensors[stored] for alias, stored in file.aliases.items()}
    return file


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied if it lies askew; of our own files none but small ones does."""
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def _description(file: File, lowbit_version: str) -> dict[str, Any]:
    return {
        "layout_version": _core.LAYOUT_VERSION,
        "lowbit_version": lowbit_version,
        "layers": {
            name: {"class": class_name, "scheme": scheme.to_dict()}
            for name, (class_name, scheme) in file.layers.items()
        },
        "aliases": file.aliases,
        "epilogues": file.epilogues,
        "network": file.network,
        "account": {
            name: {
                "kind": entry.kind,
                "shape": list(entry.shape),
                "bytes_before": entry.bytes_before,
                "note": entry.note,
                "folded": entry.folded,
            }
            for name, entry in file.account.items()
        },
    }


def _parse(path: str, text: str) -> File:
    try:
        header: Mapping[str, Any] = dict(json.loads(text))
        version = header["layout_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FileFormatError(f"{path}: its lowbit metadata is damaged ({error!r})") from error
    if type(version) is not int or version < 1:
        raise FileFormatError(f"{path}: its layout version is {version!r}, no version number")
    if version != _core.LAYOUT_VERSION:
        remedy = (
            "upgrade lowbit"
            if version > _core.LAYOUT_VERSION
            else "convert the float model again, or use that lowbit"
        )
        raise FileFormatError(
            f"{path}: layout version {version}, written by lowbit {header.get('lowbit_version')}; "
            f"this lowbit reads version {_core.LAYOUT_VERSION}: {remedy}"
        )
    file = File(path)
    name = ""
    try:
        file.aliases = {str(key): str(value) for key, value in dict(header["aliases"]).items()}
        for name, item in dict(header["layers"]).items():
            file.layers[name] = str(item["class"]), Scheme.parse(dict(item["scheme"]))
        for name, epilogue in dict(header.get("epilogues", {})).items():
            if epilogue not in _core.EPILOGUES:
                raise ValueError(f"epilogue {epilogue!r}")
            file.epilogues[name] = epilogue
        network = header.get("network")
        file.network = None if network is None else dict(network)
        for name, item in dict(header["account"]).items():
            file.account[name] = Entry(
                kind=_printable(item["kind"]),
                shape=tuple(int(size) for size in item["shape"]),
                bytes_before=int(item["bytes_before"]),
                note=_printable(item["note"]),
                folded=_printable(item.get("folded", "")),
            )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        where = f" of layer '{name}'" if name else ""
        raise FileFormatError(
            f"{path}: its lowbit metadata{where} is damaged, or of a newer lowbit ({error!r})"
        ) from error
    return file


def _printable(text: object) -> str:
    """Text of a file that a terminal can show as it is."""
    return "".join(c if c.isprintable() else "?" for c in str(text))
