r"""The masses of a network's weights: what the convex problem of balancing is made of.

An element $w$ that feeds the scale $r$ and reads the scale $c$ has the mass $\lambda|w|^p$, and
with log scales $z$ it weighs $\lambda|w|^p e^{p(z_r - z_c)}$. The sum over all elements is to be
least.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.errors import ConfigError
from evenkeel.graph import Scaled, viewed


@dataclass(frozen=True)
class Block:
    """The masses of one parameter, summed over the kernel's positions.

    Attributes:
        mass: (R, K), float64.
        rows: variables of what is fed, (R, 1) or (R, K); -1 for what is pinned.
        columns: variables of what is read, (1, K), (R, 1) or (R, K).
    """

    mass: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether every output reads every input."""
        return self.rows.shape[1] == 1 and self.columns.shape[0] == 1

    def into(self, v: Tensor) -> Tensor:
        """Sum over what each row reads, mass times ``v`` there; of the shape of ``rows``."""
        if self.is_dense:
            return self.mass @ v[self.columns].T
        return (self.mass * v[self.columns]).sum_to_size(self.rows.shape)

    def out_of(self, v: Tensor) -> Tensor:
        """Sum over what each column feeds, mass times ``v`` there; of the shape of ``columns``."""
        if self.is_dense:
            return v[self.rows].T @ self.mass
        return (self.mass * v[self.rows]).sum_to_size(self.columns.shape)

    def without(self, drop: Tensor) -> "Block":
        """With no mass where ``drop`` (R, K) says so."""
        return Block(self.mass.masked_fill(drop, 0.0), self.rows, self.columns)


def block_of(
    place: Scaled, parameter: Tensor, *, p: float, depth_factor: float, biases: bool
) -> Block:
    r"""The masses of one place; $\lambda = c^{-p\,\mathrm{depth}}$, and 0 for a bias left out.

    Raises:
        ConfigError: a weight is not finite.
    """
    view = viewed(parameter.detach(), place.leaf.view)
    weight = 0.0 if place.bias and not biases else depth_factor ** (-p * place.depth)
    shape = torch.broadcast_shapes(place.rows.shape, place.columns.shape)
    shape = (1,) * (view.dim() - len(shape)) + tuple(shape)
    over = [axis for axis, size in enumerate(shape) if size == 1]
    norms = torch.linalg.vector_norm(view, p, over, keepdim=True, dtype=torch.float64)
    mass = weight * (norms if over else view.double().abs()).pow(p)
    if not bool(mass.isfinite().all()):
        raise ConfigError(
            f"Weights must be finite to be balanced; '{place.leaf.path}' holds values that are not."
        )
    return Block(*_matrices(mass, place.rows, place.columns))


def _matrices(mass: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All as matrices, outputs first."""
    rows, columns = (t.view((1,) * (mass.dim() - t.dim()) + t.shape) for t in (rows, columns))
    if columns.numel() == 1 or rows.shape == columns.shape:  # one column each, or none
        return mass.reshape(-1, 1), rows.reshape(-1, 1), columns.reshape(-1, 1)
    single = [axis for axis, size in enumerate(mass.shape) if size == 1]
    given = [t.squeeze(single) for t in (mass, rows, columns)]
    if given[0].dim() < 2:
        given = [t.unsqueeze(-1) for t in given]
    if given[1].shape[0] == 1:  # as of a transposed convolution
        given = [t.T for t in given]
    mass, rows, columns = given
    return mass, rows, columns
