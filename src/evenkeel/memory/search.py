"""Nearest binary vectors by Hamming distance, packed eight components to a byte."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import ConfigError, MissingExtraError, ShapeError, nearest

Backend = Literal["faiss", "numpy"]
BLOCK = 8192
"""Keys that are compared at once: what is written on the way stays in a core's cache."""


class BitIndex:
    r"""Binary vectors, searched by Hamming distance.

    A vector takes d/8 bytes, in whole words of eight. Distances are exact,
    $H = \sum_w \mathrm{popcount}(q_w \oplus k_w)$ over words of 64 components; of bipolar vectors
    the similarity is $1 - 2H/d$.

    Args:
        dim: of the vectors, d.
        backend: "faiss" (its ``IndexBinaryFlat``, from the extra ``memory``) or "numpy"; default:
            faiss where it is installed.

    Shape:
        vectors (n, d), of which a component counts as 1 where it is above 0.

    Examples:
        >>> index = BitIndex(64)
        >>> index.add(torch.eye(64)[:3])
        >>> distances, rows = index.search(torch.eye(64)[1:2], k=2)
        >>> distances.tolist(), rows.tolist()
        ([[0, 2]], [[1, 0]])
    """

    def __init__(self, dim: int, backend: Backend | None = None) -> None:
        if dim < 1:
            raise ConfigError(f"dim must be 1 or more; got {dim!r}.")
        installed = importlib.util.find_spec("faiss") is not None
        self.dim = dim
        words = -(-dim // 64)  # the last is filled up with zeros, which are in no distance
        self.backend = backend or ("faiss" if installed else "numpy")
        if self.backend not in get_args(Backend):
            known = get_args(Backend)
            raise ConfigError(f"Unknown backend {backend!r}. {nearest(str(backend), known)}")
        if self.backend == "faiss":
            self._faiss = _faiss(64 * words)
        self._words = np.empty((words, 0), np.uint64)  # by word, so that blocks are contiguous

    def __len__(self) -> int:
        """Number of vectors."""
        return int(self._faiss.ntotal) if self.backend == "faiss" else self._words.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return len(self) * 8 * len(self._words)

    def add(self, vectors: Tensor) -> None:
        """Take in further vectors (n, d)."""
        packed = self._packed(vectors)
        if self.backend == "faiss":
            self._faiss.add(packed)
        else:
            self._words = np.concatenate([self._words, packed.view(np.uint64).T], 1)

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k nearest of each query (q, d): distances and rows, (q, k), the nearest first.

        Of equal ones the backend takes any. Fewer than k, where there are no more.
        """
        if not len(self):
            raise ConfigError("The index is empty: add some vectors before searching.")
        if k < 1:
            raise ConfigError(f"k must be 1 or more; got {k!r}.")
        k, packed = min(k, len(self)), self._packed(queries)
        if self.backend == "faiss":
            distances, rows = self._faiss.search(packed, k)
        else:
            distances, rows = self._search(packed.view(np.uint64), k)
        return torch.from_numpy(distances.astype(np.int64)), torch.from_numpy(rows.astype(np.int64))

    def _packed(self, vectors: Tensor) -> np.ndarray:
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise ShapeError(
                f"The index needs vectors (n, {self.dim}); got shape {tuple(vectors.shape)}."
            )
        packed = np.packbits((vectors.detach() > 0).cpu().numpy(), axis=1)
        return np.pad(packed, ((0, 0), (0, 8 * len(self._words) - packed.shape[1])))

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Queries (q, words) are dealt out to as many threads as torch uses."""
        threads = max(1, min(torch.get_num_threads(), len(queries)))
        with ThreadPoolExecutor(threads) as pool:
            parts = list(
                pool.map(lambda part: self._nearest(part, k), np.array_split(queries, threads))
            )
        distances, rows = (np.concatenate(side) for side in zip(*parts, strict=True))
        return distances, rows

    def _nearest(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        distances = np.full((len(queries), k), self.dim + 1, np.uint32)
        rows = np.zeros((len(queries), k), np.int64)
        words = np.empty((len(self._words), BLOCK), np.uint64)
        counts = np.empty(words.shape, np.uint8)
        for start in range(0, len(self), BLOCK):
            block = self._words[:, start : start + BLOCK]
            n = block.shape[1]
            for i, query in enumerate(queries):
                np.bitwise_xor(block, query[:, None], out=words[:, :n])
                np.bitwise_count(words[:, :n], out=counts[:, :n])
                total = np.add.reduce(counts[:, :n], axis=0, dtype=np.uint32)
                better = np.flatnonzero(total < distances[i, -1])
                if len(better) > k:
                    better = better[np.argpartition(total[better], k - 1)[:k]]
                if len(better):
                    found = np.concatenate([distances[i], total[better]])
                    order = np.argsort(found, kind="stable")[:k]
                    distances[i] = found[order]
                    rows[i] = np.concatenate([rows[i], better + start])[order]
        return distances, rows


def _faiss(dim: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("BitIndex(backend='faiss')", "memory") from error
    return faiss.IndexBinaryFlat(dim)
