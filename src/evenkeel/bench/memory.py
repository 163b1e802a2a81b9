"""Search among binary vectors: bits by faiss and by torch, products of floats, and torchhd."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evenkeel.bench.timing import compare
from evenkeel.errors import MissingExtraError
from evenkeel.memory import BitIndex

DIM, QUERIES, TOP = 512, 100, 5
SIZES = (500, 10_000, 100_000, 1_000_000)

Search = Callable[[], object]


def bench(
    *,
    sizes: tuple[int, ...] = SIZES,
    rounds: int = 5,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row of figures for every number of keys and way of searching: the top 5 of 100 queries."""
    if importlib.util.find_spec("faiss") is None:
        raise MissingExtraError("evenkeel bench memory", "memory")
    rows: list[dict[str, Any]] = []
    for done, size in enumerate(sizes):
        progress(done, len(sizes))
        rows += _rows(size, rounds)
    progress(len(sizes), len(sizes))
    return rows


def _rows(size: int, rounds: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(size)
    keys, queries = (
        torch.randint(0, 2, (n, DIM), generator=generator, dtype=torch.bool)
        for n in (size, QUERIES)
    )
    candidates = {
        "faiss IndexBinaryFlat": _bare_faiss(keys, queries),
        "BitIndex, faiss": _bits(keys, queries, "faiss"),
        "BitIndex, torch": _bits(keys, queries, "torch"),
        "products, float32": _products(keys, queries),
    }
    if importlib.util.find_spec("torchhd") is not None:
        candidates["torchhd BSC"] = _torchhd(keys, queries)
    timings = compare([run for run, _ in candidates.values()], rounds)
    return [
        {
            "keys": size,
            "way": name,
            **timing.to_dict(),
            "bytes": nbytes,
        }
        for (name, (_, nbytes)), timing in zip(candidates.items(), timings, strict=True)
    ]


def _bare_faiss(keys: Tensor, queries: Tensor) -> tuple[Search, int]:
    import faiss
    import numpy as np

    index = faiss.IndexBinaryFlat(DIM)
    index.add(np.packbits(keys.numpy(), axis=1))
    packed = np.packbits(queries.numpy(), axis=1)
    return lambda: index.search(packed, TOP), len(keys) * DIM // 8


def _bits(keys: Tensor, queries: Tensor, backend: Any) -> tuple[Search, int]:
    index = BitIndex(DIM, backend)
    index.add(keys)
    return lambda: index.search(queries, TOP), index.nbytes


def _products(keys: Tensor, queries: Tensor) -> tuple[Search, int]:
    signs, asked = (2 * x.float() - 1 for x in (keys, queries))
    return lambda: (asked @ signs.T).topk(TOP), signs.nbytes


def _torchhd(keys: Tensor, queries: Tensor) -> tuple[Search, int]:
    import torchhd

    kept, asked = (x.as_subclass(torchhd.BSCTensor) for x in (keys, queries))
    return lambda: torchhd.dot_similarity(asked, kept).topk(TOP), keys.nbytes
