"""A memory of keys with labels, read by attention over the keys."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, ShapeError, nearest
from evenkeel.layers import lasting_tensors
from evenkeel.memory.attention import STIFFNESS, attention, nearest_support, summed
from evenkeel.memory.codes import Code, Measure, encode, measure_of, similarity

if TYPE_CHECKING:
    from evenkeel.analog import Converter, Device, DeviceModel
    from evenkeel.memory.crossbar import CrossbarMemory
    from evenkeel.memory.search import BitIndex

ReadOut = Literal["sum", "nearest"]
SHARPENING_OF = {"real": "softabs", "bipolar": "abs", "complement": "abs", "binary": "identity"}
"""What each code takes: the absolute value stands for softabs, and binary needs none."""

PACKED_FROM = 4096
"""Rows from which on a search by bits is the faster."""


@dataclass(frozen=True)
class Reading:
    """What a memory says to queries.

    Attributes:
        scores: (..., classes), the attention of each class; they sum to 1 for the read-out "sum".
        attention: (..., supports), which sums to 1.
        similarity: (..., supports).
        classes: the labels, in the order of ``scores``.
    """

    scores: Tensor
    attention: Tensor
    similarity: Tensor
    classes: tuple[Hashable, ...]

    @property
    def best(self) -> Tensor:
        """(...), index into ``classes`` of the largest score."""
        return self.scores.argmax(-1)

    @property
    def labels(self) -> list[Hashable]:
        """The labels of the largest scores, of all queries in a row."""
        return [self.classes[i] for i in self.best.flatten().tolist()]


class KeyValueMemory(nn.Module):
    r"""Vectors with labels, of which a query recalls the label of what it is like.

    With $\alpha_i$ the similarity of a query to key $i$, sharpened by $\varepsilon$,

    $$ w_i = \frac{\varepsilon(\alpha_i)}{\sum_j \varepsilon(\alpha_j)}, \qquad
       P_c = \sum_{i \in c} w_i. $$

    It grows as it is written. Recall is differentiable in queries and, until they are detached, in
    keys; ``write`` keeps the graph of its keys.

    Args:
        dim: of the vectors, d.
        code: how they are kept, see :func:`evenkeel.memory.encode`.
        measure: "cosine" or "dot" instead of the code's own, see
            :func:`evenkeel.memory.similarity`.
        sharpening: $\varepsilon$, one of :data:`evenkeel.memory.SHARPENINGS`; default: that of the
            code, softabs for real, abs for bipolar and complement, identity for binary.
        stiffness: $\beta$ of softabs and softmax.
        read_out: "sum" over the supports of a class, or its "nearest" one.
        prototypes: keep one key for each class, the mean of its encoded supports (real), or what
            most of them have at each place (other codes; where they are split, what 0 is to them).
        device: of what is kept.
        dtype: of what is kept.

    Shape:
        keys (n, d); queries (..., d) -> scores (..., classes).

    Raises:
        ConfigError: an unknown option; nothing was written yet; a label that is not there.
        ShapeError: vectors of another dimension, not finite, or not as many labels as keys. The
            memory is then as it was.

    Examples:
        >>> import torch, evenkeel as ek
        >>> memory = ek.memory.KeyValueMemory(4)
        >>> memory.write(torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]]), ["cat", "dog"])
        >>> memory.read(torch.tensor([0.1, 2.0, 0, 0])).labels
        ['dog']

    References:
        Karunaratne et al., "Robust high-dimensional memory-augmented neural networks", Nature
        Communications 12, 2468 (2021).
    """

    keys: Tensor
    owners: Tensor

    def __init__(
        self,
        dim: int,
        *,
        code: Code = "real",
        measure: Measure | None = None,
        sharpening: str | None = None,
        stiffness: float = STIFFNESS,
        read_out: ReadOut = "sum",
        prototypes: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own_measure = measure_of(code, measure)
        if dim < 1:
            raise ConfigError(f"dim must be 1 or more; got {dim!r}.")
        if read_out not in get_args(ReadOut):
            raise ConfigError(
                f"Unknown read_out {read_out!r}. {nearest(read_out, get_args(ReadOut))}"
            )
        super().__init__()
        self.dim = dim
        self.code: Code = code
        self.measure = own_measure
        self.sharpening = SHARPENING_OF[code] if sharpening is None else sharpening
        self.stiffness = stiffness
        self.read_out = read_out
        self.prototypes = prototypes
        self.classes: list[Hashable] = []
        self._index: BitIndex | None = None
        width = 2 * dim if code == "complement" else dim
        attention(torch.zeros(1), self.sharpening, stiffness)  # refuses an unknown one here
        self.register_buffer("keys", torch.zeros(0, width, device=device, dtype=dtype))
        self.register_buffer("owners", torch.zeros(0, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        """Number of supports."""
        return len(self.owners)

    def write(self, keys: Tensor, labels: Sequence[Hashable] | Tensor) -> None:
        """Add supports; labels that are new become classes."""
        keys, labels = self._checked(keys, labels)
        classes = list(dict.fromkeys([*self.classes, *labels]))
        number = {label: i for i, label in enumerate(classes)}
        owners = torch.tensor([number[label] for label in labels], dtype=torch.int64)
        self._become(classes, self.owners >= 0, keys, owners)

    def forget(self, label: Hashable) -> None:
        """Remove a class with all its supports."""
        gone = self._class_of(label)
        classes = [known for known in self.classes if known != label]
        nothing = self.keys.new_zeros(0, self.dim), self.owners.new_zeros(0)
        self._become(classes, self.owners != gone, *nothing)

    def replace(self, label: Hashable, keys: Tensor) -> None:
        """Put other supports in the place of a class's."""
        gone = self._class_of(label)
        if not len(keys):
            raise ConfigError(f"Nothing to put in the place of {label!r}; use forget to remove it.")
        keys, _ = self._checked(keys, [label] * len(keys))
        self._become(self.classes, self.owners != gone, keys, torch.full((len(keys),), gone))

    def _become(self, classes: list[Hashable], kept: Tensor, keys: Tensor, owners: Tensor) -> None:
        """Keep some supports and add others: the one place where what is held changes."""
        number = {label: i for i, label in enumerate(classes)}
        with lasting_tensors():
            moved = self.owners.new_tensor([number.get(label, -1) for label in self.classes])
            self.keys = torch.cat([self.keys[kept], encode(keys, self.code).to(self.keys)])
            self.owners = torch.cat([moved[self.owners[kept]], owners.to(self.owners)])
        self.classes = classes
        self._index = None

    def read(self, queries: Tensor) -> Reading:
        """What queries (..., d) recall."""
        self._require_readable(queries)
        alpha, owners = self.similarities(encode(queries.to(self.keys.dtype), self.code))
        weights = attention(alpha, self.sharpening, self.stiffness)
        out = summed if self.read_out == "sum" else nearest_support
        return Reading(out(weights, owners, len(self.classes)), weights, alpha, tuple(self.classes))

    forward = read

    def rows(self) -> tuple[Tensor, Tensor]:
        """The keys that are compared with, (rows, width), and the class of each."""
        if not self.prototypes:
            return self.keys, self.owners
        number = len(self.classes)
        total = self.keys.new_zeros(number, self.keys.shape[1]).index_add(0, self.owners, self.keys)
        count = torch.bincount(self.owners, minlength=number).to(total.dtype).unsqueeze(1)
        mean = total / count
        if self.code != "real":  # binary codes are about a half, and complements follow suit
            middle = mean if self.code == "bipolar" else mean - 0.5
            mean = encode(middle[:, : self.dim], self.code)
        return mean, torch.arange(number, device=mean.device)

    def nearest(self, queries: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k rows that queries (..., d) are most like: similarities and rows, (..., k).

        A row is a support, or the prototype of a class; fewer than k, where there are no more. Many
        rows of bipolar or complement code are searched as bits, see
        :class:`evenkeel.memory.BitIndex`, without a gradient; they are packed once for all searches
        until something is written.
        """
        self._require_readable(queries)
        if k < 1:
            raise ConfigError(f"k must be 1 or more; got {k!r}.")
        index = self._bits()
        if index is None:
            alpha, _ = self.similarities(encode(queries.to(self.keys.dtype), self.code))
            best = alpha.topk(min(k, alpha.shape[-1]))
            return best.values, best.indices
        distances, rows = index.search(queries.reshape(-1, self.dim), k)
        alpha = (1 - 2 * distances.to(self.keys.dtype) / self.dim).to(queries.device)
        shape = (*queries.shape[:-1], -1)
        return alpha.view(shape), rows.to(queries.device).view(shape)

    def _bits(self) -> "BitIndex | None":
        """The rows as bits, where there are many whose similarity is one of bits."""
        number = len(self.classes) if self.prototypes else len(self)
        if self.code not in ("bipolar", "complement") or number < PACKED_FROM:
            return None
        if self._index is None:
            from evenkeel.memory.search import BitIndex

            self._index = BitIndex(self.dim)
            self._index.add(self.rows()[0][:, : self.dim])
        return self._index

    def similarities(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Similarities of encoded queries to each row, (..., rows), and the class of each row."""
        keys, owners = self.rows()
        return similarity(queries, keys, self.code, self.measure), owners

    def program(
        self,
        device: "Device | DeviceModel",
        *,
        seed: int,
        converter: "Converter | None" = None,
    ) -> "CrossbarMemory":
        """This memory on a crossbar; see :class:`evenkeel.memory.CrossbarMemory`."""
        from evenkeel.memory.crossbar import CrossbarMemory

        memory = CrossbarMemory(
            self.dim, device, seed=seed, converter=converter, **self.options()
        ).to(self.keys.device)
        if self.classes:
            keys = self.keys[:, : self.dim]
            memory._become([*self.classes], memory.owners >= 0, keys, self.owners)
        return memory

    def options(self) -> dict[str, Any]:
        """What it was made with, besides its size."""
        return {
            "code": self.code,
            "measure": self.measure,
            "sharpening": self.sharpening,
            "stiffness": self.stiffness,
            "read_out": self.read_out,
            "prototypes": self.prototypes,
            "dtype": self.keys.dtype,
        }

    def extra_repr(self) -> str:
        """What it was made with, and what it holds."""
        return (
            f"{self.dim}, code={self.code!r}, sharpening={self.sharpening!r}, "
            f"read_out={self.read_out!r}"
            + (", prototypes=True" if self.prototypes else "")
            + f"; {len(self)} supports of {len(self.classes)} classes"
        )

    def get_extra_state(self) -> list[Hashable]:
        """The classes, for ``state_dict``."""
        return list(self.classes)

    def set_extra_state(self, state: list[Hashable]) -> None:
        """The classes, from ``state_dict``."""
        self.classes = list(state)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        # It takes the size of what was kept.
        for name in ("keys", "owners"):
            if (given := state.get(prefix + name)) is not None:
                own = getattr(self, name)
                setattr(self, name, own.new_empty((len(given), *own.shape[1:])))
        super()._load_from_state_dict(state, prefix, *args)
        self._index = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be derived."""
        return {**self.__dict__, "_index": None}

    def _class_of(self, label: Hashable) -> int:
        if label not in self.classes:
            raise ConfigError(
                f"The memory has no class {label!r}. {nearest(str(label), map(str, self.classes))}"
            )
        return self.classes.index(label)

    def _checked(
        self, keys: Tensor, labels: Sequence[Hashable] | Tensor
    ) -> tuple[Tensor, list[Hashable]]:
        self._require_vectors(keys, "keys")
        given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if keys.dim() != 2 or len(given) != len(keys):
            raise ShapeError(
                f"The memory needs keys (n, {self.dim}) with a label for each; got keys of shape "
                f"{tuple(keys.shape)} and {len(given)} labels."
            )
        return keys, given

    def _require_readable(self, queries: Tensor) -> None:
        if not len(self):
            raise ConfigError("The memory is empty: write some keys with labels before reading.")
        self._require_vectors(queries, "queries")

    def _require_vectors(self, x: Tensor, what: str) -> None:
        if not x.dim() or x.shape[-1] != self.dim:
            raise ShapeError(
                f"The memory needs {what} of {self.dim} dimensions, on the last axis; got shape "
                f"{tuple(x.shape)}."
            )
        kept = x.detach().to(self.keys.dtype)  # which may have no room for what x has
        if torch.compiler.is_compiling() or bool(torch.isfinite(kept.sum())):  # the cheaper look
            return
        if bad := (~torch.isfinite(kept)).flatten(0, -2).any(-1).nonzero().flatten().tolist():
            raise ShapeError(
                f"The memory needs {what} that are finite; got NaN or infinity in "
                f"{len(bad)} of {math.prod(x.shape[:-1])}, the first at {bad[:3]}. Look at the "
                f"encoder's output."
            )
