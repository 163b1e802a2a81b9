"""How vectors are written into a memory, and how alike two of them are."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from evenkeel.errors import ConfigError, nearest

Code = Literal["real", "bipolar", "binary", "complement"]
CODES = get_args(Code)
Measure = Literal["cosine", "dot"]


def require_code(code: str) -> None:
    """Refuse a code that there is not."""
    if code not in CODES:
        raise ConfigError(f"Unknown code {code!r}. {nearest(code, CODES)}")


def encode(x: Tensor, code: Code) -> Tensor:
    r"""Vectors (..., d) as they are kept and compared.

    - real: as they are;
    - bipolar: 1 where $x > 0$, else -1;
    - binary: 1 where $x > 0$, else 0;
    - complement: the binary one and what it is not, (..., 2 d).

    Examples:
        >>> x = torch.tensor([0.3, -2.0, 0.0])
        >>> encode(x, "bipolar").tolist(), encode(x, "complement").tolist()
        ([1.0, -1.0, -1.0], [1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    """
    require_code(code)
    if code == "real":
        return x
    binary = (x > 0).to(x.dtype)
    if code == "bipolar":
        return 2 * binary - 1
    return binary if code == "binary" else torch.cat([binary, 1 - binary], -1)


def similarity(queries: Tensor, keys: Tensor, code: Code, measure: Measure | None = None) -> Tensor:
    r"""How alike encoded queries (..., d) and keys (n, d) are, (..., n).

    - real: the cosine, $\langle a, b\rangle / (\lVert a\rVert\,\lVert b\rVert)$;
    - bipolar: $\langle a, b\rangle / d$, which is the cosine;
    - binary: $2\langle a, b\rangle / d$, about half of one for vectors that have nothing in common;
    - complement: $2\langle a, b\rangle / d - 1$ with d before doubling: the bipolar one, exactly.

    Args:
        queries: encoded.
        keys: encoded.
        code: of both.
        measure: "cosine" or "dot" instead, where they differ: a real inner product, or a binary
            cosine, which does not prefer keys of many ones.

    Examples:
        >>> x, y = torch.tensor([1.0, -1.0, 2.0, 3.0]), torch.tensor([[1.0, 1.0, 1.0, -1.0]])
        >>> [similarity(encode(x, c), encode(y, c), c).tolist() for c in ("bipolar", "complement")]
        [[0.0], [0.0]]
    """
    measure = measure_of(code, measure)
    if measure == "cosine":
        queries, keys = F.normalize(queries, dim=-1), F.normalize(keys, dim=-1)
    return of_products(queries @ keys.transpose(-1, -2), keys.shape[-1], code, measure)


def measure_of(code: Code, measure: Measure | None) -> Measure:
    """The measure that is asked for, or the code's own; where both are the same, dot."""
    require_code(code)
    if measure is not None and measure not in get_args(Measure):
        raise ConfigError(f"Unknown measure {measure!r}. {nearest(measure, get_args(Measure))}")
    if code in ("bipolar", "complement"):
        return "dot"
    return measure or ("cosine" if code == "real" else "dot")


def of_products(products: Tensor, width: int, code: Code, measure: Measure) -> Tensor:
    """Similarities from inner products of encoded vectors of that width; for cosine, unit ones."""
    if code == "real" or measure == "cosine":
        return products
    if code == "complement":
        return 4 * products / width - 1
    return (2 if code == "binary" else 1) * products / width
