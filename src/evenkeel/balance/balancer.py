"""Balancer: one sweep of balancing after each step of training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evenkeel.balance.apply import Carried, move
from evenkeel.balance.masses import block_of
from evenkeel.balance.optimizer_state import require_rule
from evenkeel.errors import ConfigError
from evenkeel.graph import find_scales


class Balancer:
    r"""Keeps a network balanced while it trains: the published Equi-normalization.

    Every :meth:`step` moves each free channel by $\frac1{2p}\log(\mathrm{out}/\mathrm{in})$, all at
    once, which never raises the norm that :func:`balance_` minimises. Call it after
    ``optimizer.step()``; call :func:`balance_` once at the start, as a sweep corrects neighbours
    quickly and the whole depth slowly. What a sweep costs does not depend on the batch.

    Use for deep networks without normalizers, and for batches too small to normalize by. Not with
    batch norm for accuracy's sake: there only the weights behind it are moved.

    Args:
        model: the network, whose structure must stay as it is.
        example_inputs: a tensor, or the tuple of the network's positional arguments.
        optimizer: whose state is carried along; None for none.
        p: power of the norm.
        depth_factor: $c$, above 1 to move mass from early layers to late; published: 1.2 for fully
            connected networks and 1.1 for convolutions.
        biases: whether biases count; published: not, as training is more stable. They are scaled in
            any case.
        copies: networks with the same parameters, such as a running average; scaled likewise.

    Raises:
        ConfigError: an option out of its range, or an optimizer without a rule.
        GraphError: the network cannot be captured.

    Examples:
        >>> import torch, evenkeel as ek
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> balancer = ek.Balancer(net, torch.randn(2, 4), optimizer)
        >>> net(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> balancer.step() > 0  # the largest change of a log scale
        True

    References:
        Stock et al., "Equi-normalization of Neural Networks", ICLR 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        p: float = 2.0,
        depth_factor: float = 1.0,
        biases: bool = False,
        copies: Sequence[nn.Module] = (),
    ) -> None:
        for name, value in (("p", p), ("depth_factor", depth_factor)):
            if not value > 0:
                raise ConfigError(f"{name} must be above 0; got {value!r}.")
        self._carried = Carried(model, optimizer, copies)
        self.scales = find_scales(model, example_inputs)
        self._options: dict[str, Any] = {"p": p, "depth_factor": depth_factor, "biases": biases}

    @torch.no_grad()
    def step(self) -> float:
        """One sweep over all free channels; the largest change of a log scale.

        Processes that train together take the first one's scales.
        """
        if self._carried.optimizer is not None:
            require_rule(self._carried.optimizer)  # its state may have come since
        z = self._steps()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            z = z.to(next(self._carried.model.parameters()).device)
            torch.distributed.broadcast(z, src=0)
            z = z.cpu()
        by = move(self.scales.places, z)
        for path, parameter in self._carried.model.named_parameters():
            by.rescale_(path, parameter)
        self._carried.rescale_(by)
        return float(z.abs().max())

    def _steps(self) -> Tensor:
        """Log scales to move by; 0 where nothing comes in or goes out, and for what is pinned."""
        into, out = torch.zeros(2, self.scales.number + 1, dtype=torch.float64)
        parameters = dict(self._carried.model.named_parameters(remove_duplicate=False))
        for place in self.scales.places:
            block = block_of(place, parameters[place.leaf.path], **self._options)
            mass = block.mass.masked_fill_((block.rows == block.columns).to(block.mass.device), 0)
            rows, columns = (mass.sum_to_size(t.shape) for t in (block.rows, block.columns))
            into.index_put_((block.rows,), rows.to(into.device), accumulate=True)
            out.index_put_((block.columns,), columns.to(out.device), accumulate=True)
        z: Tensor = (out / into).log() / (2 * self._options["p"])
        z[-1] = 0.0
        return z.where((into > 0) & (out > 0) & z.isfinite(), 0.0)
