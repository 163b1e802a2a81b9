"""Nearest binary vectors by Hamming distance, packed eight components to a byte."""

import importlib.util
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evenkeel.errors import ConfigError, MissingExtraError, ShapeError, nearest

Backend = Literal["faiss", "torch"]
BLOCK = 8192
"""Keys that are compared at once: what is written on the way stays in the cache."""
FEW = 16
"""Queries up to which counting bits is faster than multiplying them."""


class BitIndex:
    r"""Binary vectors, searched by Hamming distance.

    A vector takes d/8 bytes, in whole words of eight. Distances H, the number of components that
    differ, are exact; of bipolar vectors the similarity is $1 - 2H/d$.

    Args:
        dim: of the vectors, d.
        backend: "faiss" (its ``IndexBinaryFlat``, from the extra ``memory``) or "torch"; default:
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
        self.backend = backend or ("faiss" if installed else "torch")
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
        if not len(packed):
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k, dtype=torch.int64)
        if self.backend == "faiss":
            distances, rows = map(torch.from_numpy, self._faiss.search(packed, k))
        else:
            distances, rows = self._search(packed.view(np.uint64), k)
        return distances.long(), rows.long()

    def _packed(self, vectors: Tensor) -> np.ndarray:
        if vectors.dim() != 2 or vectors.shape[1] != self.dim:
            raise ShapeError(
                f"The index needs vectors (n, {self.dim}); got shape {tuple(vectors.shape)}."
            )
        packed = np.packbits((vectors.detach() > 0).cpu().numpy(), axis=1)
        return np.pad(packed, ((0, 0), (0, 8 * len(self._words) - packed.shape[1])))

    def _search(self, queries: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        """Block by block; queries are words, (q, d/64)."""
        distances = torch.empty(len(queries), 0, dtype=torch.int32)
        rows = distances.long()
        between = by_counting if len(queries) <= FEW else by_products
        for start in range(0, len(self), BLOCK):
            block = between(queries, self._words[:, start : start + BLOCK])
            nearest = block.topk(min(k, block.shape[1]), largest=False)
            distances = torch.cat([distances, nearest.values], 1)
            rows = torch.cat([rows, nearest.indices + start], 1)
            distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
            rows = rows.gather(1, order)
        return distances, rows


def by_counting(queries: np.ndarray, keys: np.ndarray) -> Tensor:
    r"""Distances (q, n) of queries (q, words) and keys (words, n): the ones of $q \oplus k$."""
    counts = [np.bitwise_count(keys ^ query[:, None]).sum(0, dtype=np.int32) for query in queries]
    return torch.from_numpy(np.stack(counts))


def by_products(queries: np.ndarray, keys: np.ndarray) -> Tensor:
    r"""The same as $\sum q + \langle 1 - 2q,\, k\rangle$, over integers of eight bits."""
    q, k = (
        torch.from_numpy(np.unpackbits(np.ascontiguousarray(words).view(np.uint8), 1).view(np.int8))
        for words in (queries, keys.T)
    )
    if torch.backends.mkldnn.is_available() and hasattr(torch, "_int_mm"):
        products = torch._int_mm(1 - 2 * q, k.T)
    else:  # it has no public name yet, and would be a plain loop; floats are exact here, and slower
        products = ((1 - 2 * q).float() @ k.T.float()).int()
    return products + q.sum(1, keepdim=True, dtype=torch.int32)


def _faiss(dim: int) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("BitIndex(backend='faiss')", "memory") from error
    return faiss.IndexBinaryFlat(dim)
