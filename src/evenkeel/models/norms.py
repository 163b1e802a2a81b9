"""Normalizers of the reference networks, by name, and networks that are built with them."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from evenkeel.errors import ConfigError, nearest
from evenkeel.norm import BatchChannelNorm2d, GhostBatchNorm2d, standardize_weights_

NormLayer = Callable[[int], nn.Module]

GROUP = 8
"""Channels of a group under group and batch-channel norm."""


class ChannelAffine(nn.Module):
    r"""What is left of a normalizer without the normalizing: $y_c = \gamma_c x_c + \beta_c$."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return x * self.weight[:, None, None] + self.bias[:, None, None]


NORMS: dict[str, Callable[[int, int | None], nn.Module]] = {
    "batch": lambda c, size: (
        nn.BatchNorm2d(c) if size is None else GhostBatchNorm2d(c, normalization_batch=size)
    ),
    "group": lambda c, size: nn.GroupNorm(c // GROUP, c),
    "layer": lambda c, size: nn.GroupNorm(1, c),
    "batch_channel": lambda c, size: BatchChannelNorm2d(c, c // GROUP, normalization_batch=size),
    "batch_channel_running": lambda c, size: BatchChannelNorm2d(
        c, c // GROUP, statistics="running", normalization_batch=size
    ),
    "none": lambda c, size: ChannelAffine(c),
}
"""By name, from channels and the samples that are normalized together (None for all)."""
KALMAN = "batch_kalman"
"""Batch norm with priors, which is made of the whole network."""


def built_with(
    make: Callable[[NormLayer], nn.Module],
    example: Tensor,
    norm: str,
    normalization_batch: int | None = None,
    weight_standard: bool = False,
) -> nn.Module:
    """The network that ``make`` gives for normalizers of that name.

    Args:
        make: from a maker of normalizers to the network.
        example: an input, for batch Kalman norm.
        norm: one of :data:`NORMS`, or "batch_kalman", which gives a
            :class:`evenkeel.norm.Kalmanized` around the network.
        normalization_batch: samples that are normalized together in training; default: the batch.
        weight_standard: whether the convolutions' weights are standardized.
    """
    if norm not in (*NORMS, KALMAN):
        raise ConfigError(f"Unknown norm {norm!r}. {nearest(norm, (*NORMS, KALMAN))}")
    size = None if norm == KALMAN else normalization_batch
    network = make(functools.partial(_made, NORMS["batch" if norm == KALMAN else norm], size))
    if weight_standard:
        standardize_weights_(network)
    if norm == KALMAN:
        from evenkeel.norm import kalmanize  # with the graph, which others do without

        return kalmanize(network, example, normalization_batch=normalization_batch)
    return network


def _made(
    norm: Callable[[int, int | None], nn.Module], size: int | None, channels: int
) -> nn.Module:
    try:
        return norm(channels, size)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"Groups of {GROUP} channels are needed; got a layer with {channels}. Give a width "
            f"that is a multiple of {GROUP}, or another norm."
        ) from error
