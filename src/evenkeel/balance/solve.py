r"""The convex problem of balancing, $\min_z \sum m_{rc}\,e^{p(z_r - z_c)}$, in float64.

It is the balancing of a matrix (Osborne 1960; Parlett and Reinsch 1969). Sweeps over channels are
quick within a layer and slow along the depth, so each is preceded by a solve of the same problem
with one variable for each layer; near the end, bounding the excess gives a step of Newton's method.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evenkeel.balance.masses import Block
from evenkeel.graph import Labels

MAX_ROUNDS = 100


@dataclass(frozen=True)
class Solution:
    """The least point.

    Attributes:
        z: log scales (n + 1,); the last is 0 and stands for all that is pinned.
        live: variables that have a best value (n,). The others are moved together, out of the way:
            weights that only they have do not grow.
        rounds: coarse solves, each with a sweep.
        value: of the objective over what can be moved.
        excess: bound on how far ``value`` is above the least one, relative to it.
    """

    z: Tensor
    live: Tensor
    rounds: int
    value: float
    excess: float


def solve(
    blocks: Sequence[Block],
    number: int,
    *,
    p: float = 2.0,
    tolerance: float = 1e-8,
    simultaneous: bool = False,
    max_rounds: int = MAX_ROUNDS,
) -> Solution:
    r"""Find the least point to a relative excess of ``tolerance``.

    Args:
        blocks: masses of all parameters.
        number: of variables, n.
        p: power of the norm, above 0.
        tolerance: on the excess, as bounded by :func:`excess`.
        simultaneous: whether a sweep moves all channels at once, or layer by layer, which takes
            half the rounds.
        max_rounds: when to stop at the latest.
    """
    fired, read = reach(blocks, number)
    alive = fired & read
    problem = _Problem([_moving(block, alive) for block in blocks], alive, p)
    z = torch.zeros(number + 1, dtype=torch.float64)
    rounds, bound = 0, math.inf if bool(alive[:-1].any()) else 0.0
    while bound > tolerance and rounds < max_rounds:
        problem.coarse_(z)
        decrease = problem.sweep_(z, simultaneous)
        rounds += 1
        value = problem.value(z)
        if decrease <= 1e-3 * value or rounds == max_rounds:
            bound, y = problem.excess(z)
            further = z + y / p  # what the bound is made of is a step of Newton's method, too
            if bound > tolerance and rounds < max_rounds and problem.value(further) < value:
                z = further
    value = problem.value(z)
    z[~read], z[read & ~fired] = float(z.min()), float(z.max())  # of which 0 is one
    return Solution(z, alive[:-1], rounds, value, bound)


def reach(blocks: Sequence[Block], number: int) -> tuple[Tensor, Tensor]:
    """Variables that something pinned reaches over weights that are not zero; that reach it.

    A channel without the first never fires, one without the second is never read: their scale has
    no best value, it would run to infinity or zero. The last entry (n + 1,) stands for all that is
    pinned.
    """

    def reached(forward: bool) -> Tensor:
        seen, before = torch.zeros(number + 1, dtype=torch.float64), 0
        seen[-1] = 1
        while (now := int(seen.sum())) > before:
            before = now
            for block in blocks if forward else reversed(blocks):
                if forward:
                    seen[block.rows] = seen[block.rows].where(block.into(seen) == 0, 1.0)
                else:
                    seen[block.columns] = seen[block.columns].where(block.out_of(seen) == 0, 1.0)
        return seen > 0

    return reached(True), reached(False)


def _moving(block: Block, alive: Tensor) -> Block:
    """Without what no live variable moves."""
    stays = block.rows == block.columns
    return block.without(stays | ~alive[block.rows] | ~alive[block.columns])


class _Problem:
    """The objective, and steps on it. ``z`` is (n + 1,), and its last entry stays 0."""

    def __init__(self, blocks: Sequence[Block], alive: Tensor, p: float) -> None:
        self.p, self.alive = p, alive.clone()
        self.alive[-1] = False
        self.blocks = [block for block in blocks if bool(block.mass.any())]
        self.space = _spaces(self.blocks, self.alive)
        self.spaces = [
            torch.nonzero(self.space == s).view(-1) for s in range(int(self.space.max()))
        ]
        self.touching = [
            [
                b
                for b in self.blocks
                if _has(self.space[b.rows], s) or _has(self.space[b.columns], s)
            ]
            for s in range(len(self.spaces))
        ]

    def flows(self, z: Tensor, blocks: Sequence[Block] | None = None) -> tuple[Tensor, Tensor]:
        """Mass that comes in and that goes out, by variable."""
        return self._flows(z, torch.ones_like(z), self.blocks if blocks is None else blocks)

    def _flows(self, z: Tensor, by: Tensor, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """The same, each mass times what ``by`` has at its other end."""
        into, out = torch.zeros_like(z), torch.zeros_like(z)
        up = (self.p * z).exp()
        down = 1 / up
        for block in blocks:
            rows = up[block.rows] * block.into(down * by)
            columns = down[block.columns] * block.out_of(up * by)
            into.index_put_((block.rows,), rows, accumulate=True)
            out.index_put_((block.columns,), columns, accumulate=True)
        return into, out

    def value(self, z: Tensor) -> float:
        """The objective."""
        return float(self.flows(z)[0].sum())

    def sweep_(self, z: Tensor, simultaneous: bool) -> float:
        r"""Balance each channel by $\frac1{2p}\log(\mathrm{out}/\mathrm{in})$; the decrease.

        The full step never raises the objective, even where all channels take it at once: by the
        inequality of means, each mass is at most half the sum of what its two ends make of it.
        """
        decrease = 0.0
        everything = [(torch.nonzero(self.alive).view(-1), self.blocks)]
        for at, blocks in (
            everything if simultaneous else zip(self.spaces, self.touching, strict=True)
        ):
            into, out = (flow[at] for flow in self.flows(z, blocks))
            z[at] += (out / into).log() / (2 * self.p)
            decrease += float((into.sqrt() - out.sqrt()).square().sum())
        return decrease

    def coarse_(self, z: Tensor) -> None:
        """Newton's method on one scale for each layer."""
        masses, y = self._between(z), torch.zeros(len(self.spaces) + 1, dtype=z.dtype)
        value, p = float(masses.sum()), self.p
        for _ in range(200):
            now = masses * (p * (y[:, None] - y)).exp()
            gradient = (now.sum(1) - now.sum(0))[:-1]
            step = torch.linalg.solve(_laplacian(now)[:-1, :-1], -gradient) / p
            gain = -float(gradient @ step) * p
            if not gain > 1e-14 * value:
                break
            length = 1.0
            while length > 1e-6:
                there = y.clone()
                there[:-1] += length * step
                new = float((masses * (p * (there[:, None] - there)).exp()).sum())
                if new <= value - 1e-4 * length * gain:
                    y, value = there, new
                    break
                length /= 2
            else:
                break
        z += y[self.space]

    def _between(self, z: Tensor) -> Tensor:
        """Mass from each layer to each, (S + 1, S + 1): rows are fed, columns are read."""
        masses, scales = z.new_zeros((len(self.spaces) + 1,) * 2), (self.p * z).exp()
        for block in self.blocks:
            up, down = scales[block.rows], 1 / scales[block.columns]
            rows, columns = self.space[block.rows], self.space[block.columns]
            if block.is_dense:
                few, which = columns.view(-1).unique(return_inverse=True)
                chosen = torch.nn.functional.one_hot(which, len(few)).to(z.dtype)
                now, columns = up * (block.mass @ (down.T * chosen)), few.view(1, -1)
            else:
                now = block.mass * up * down
            where = (rows.expand(now.shape), columns.expand(now.shape))
            masses.index_put_(where, now, accumulate=True)
        masses.fill_diagonal_(0.0)  # what stays within a layer does not change with it
        return masses

    def excess(self, z: Tensor) -> tuple[float, Tensor]:
        r"""A bound on how far the objective is above its least value, relative to it; and $y$.

        Any masses $f$ that come in and go out of every channel alike bound the least value from
        below, by $\sum f - f\log(f/m)$. Those nearest to the present masses $m$ are $f = m(1 +
        y_r - y_c)$ with $Ly = \mathrm{out} - \mathrm{in}$, $L$ the Laplacian of $m$; with them,
        the gap is at most $\frac{1 + t}{2}\,y\cdot(\mathrm{out} - \mathrm{in})$ where no $|y_r -
        y_c|$ is above $t \le 1$. The system is solved by conjugate gradients, to 1e-6.
        """
        into, out = self.flows(z)
        off = (out - into).where(self.alive, 0.0)
        y = self._solve(z, off, (into + out).where(self.alive, 1.0))
        most = float(y.max() - y.min())
        if most > 1:
            return math.inf, y
        return max(0.0, (1 + most) / 2 * float(y @ off)) / float(into.sum()), y

    def _solve(self, z: Tensor, right: Tensor, diagonal: Tensor) -> Tensor:
        """L y = right, preconditioned by its diagonal and by the same system over layers."""
        coarse = torch.linalg.inv(_laplacian(self._between(z))[:-1, :-1])

        def conditioned(r: Tensor) -> Tensor:
            by_layer = r.new_zeros(len(self.spaces) + 1).index_add_(0, self.space, r)
            by_layer[:-1] = coarse @ by_layer[:-1]
            by_layer[-1] = 0.0
            return r / diagonal + by_layer[self.space]

        y, r = torch.zeros_like(right), right
        d = q = conditioned(r)
        size = float(r @ q)
        for _ in range(len(right) + 100):
            if size <= 1e-12 * float(right @ conditioned(right)) or size == 0:
                break
            ld = (diagonal * d - sum(self._flows(z, d, self.blocks))).where(self.alive, 0.0)
            step = size / float(d @ ld)
            y, r = y + step * d, r - step * ld
            q = conditioned(r)
            size, last = float(r @ q), size
            d = q + size / last * d
        return y


def _laplacian(masses: Tensor) -> Tensor:
    return torch.diag(masses.sum(0) + masses.sum(1)) - masses - masses.T


def _spaces(blocks: Sequence[Block], alive: Tensor) -> Tensor:
    """Which layer each variable belongs to (n + 1,): those that one parameter feeds are of one.

    What is not moved comes last.
    """
    labels = Labels()
    own = labels.fresh(len(alive))
    for block in blocks:
        rows = block.rows[alive[block.rows]]
        if len(rows):
            labels.tie(own[rows], own[rows[0]], "")
    roots = labels.roots(own)
    _, numbers = roots[alive].unique(return_inverse=True)
    space = torch.full_like(roots, int(numbers.max()) + 1 if len(numbers) else 0)
    space[alive] = numbers
    return space


def _has(values: Tensor, one: int) -> bool:
    return bool((values == one).any())
