"""A JSON-lines file of what has been measured, from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

FORMAT = "lowbit measurements"


class Journal:
    """Remembers results by key; with a path, in a file that is written line by line.

    Args:
        path: of the file; made if it does not exist. None keeps everything in memory.
        header: what the results depend on. A file with another header is refused.

    Raises:
        ValueError: the file is no journal, or that of another run; the message says what differs.
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self._path = None if path is None else Path(path)
        self._results: dict[str, Any] = {}
        self.restored = 0
        if self._path is None:
            return
        first = json.dumps({"format": FORMAT, **header}, sort_keys=True)
        if self._path.exists() and self._path.stat().st_size:
            self._read(self._path, json.loads(first))
        else:
            self._path.write_text(first + "\n", encoding="utf-8")

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        # The last line may be half a line: the run was interrupted while it wrote it.
        complete = lines if text.endswith("\n") else lines[:-1]
        try:
            found, *results = [json.loads(line) for line in complete]
            if found["format"] != FORMAT:
                raise ValueError
            self._results = {entry["key"]: entry["result"] for entry in results}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is not a file of measurements to go on from") from None
        if found != header:
            names = sorted(k for k in {*found, *header} if found.get(k) != header.get(k))
            raise ValueError(
                f"{path} belongs to another run: {', '.join(names)} differ; delete it, or give "
                "another file"
            )
        self.restored = len(self._results)
        if not text.endswith("\n"):
            path.write_text("".join(line + "\n" for line in complete), encoding="utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def get(self, key: str, measure: Callable[[], Any]) -> Any:
        """The result of this key: the one on record, or else what `measure` returns now."""
        if key not in self._results:
            result = measure()
            self._results[key] = result
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "result": result}) + "\n")
        return self._results[key]


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's structure and weights."""
    digest = hashlib.blake2b(repr(model).encode(), digest_size=12)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


def data_fingerprint(batches: Any) -> str:
    """A digest of batches of inputs: nested tensors, and the text of anything else."""
    digest = hashlib.blake2b(digest_size=12)
    _add(digest, batches)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(str(key).encode())
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(f"{len(value)} of".encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
