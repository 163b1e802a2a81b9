"""How far statistics of a few samples, predictions, and both fused are from the whole data's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import evenkeel as ek
from evenkeel.moments import BatchMoments
from evenkeel.studies.frame import Facts

Statistics = tuple[Tensor, Tensor]


def distances(
    network: nn.Module,
    pool: Tensor,
    *,
    sizes: Sequence[int],
    variants: Sequence[Sequence[Any]],
    batches: int,
    oracle: int,
) -> list[Facts]:
    """Root mean square errors, by batch size and variant, over channels, layers and batches.

    A batch goes through the network in train mode. What each normalizer should have found is taken
    from ``oracle`` other samples, that go through the network with the normalizers before it held
    at what they fused from the batch.

    Args:
        network: with batch norm; left as it is.
        pool: samples, (N, C, H, W); the last ``oracle`` are the whole.
        sizes: of the batches.
        variants: pairs of gain and what is propagated.
        batches: for each size.
        oracle: samples.
    """
    rows = []
    whole, few = pool[-oracle:], pool[:-oracle]
    for gain, propagate in variants:
        kalman = ek.norm.kalmanize(network, pool[:1], gain=gain, propagate=propagate).train()
        for size in sizes:
            errors: dict[str, list[Tensor]] = {"observed": [], "prior": [], "fused": []}
            for k in range(batches):
                found = _found(kalman, few[k * size : (k + 1) * size])
                truth = _truth(
                    kalman, {path: fused for path, (_, fused, _) in found.items()}, whole
                )
                for path, (prior, fused, observed) in found.items():
                    if prior is not None:
                        for name, what in zip(errors, (observed, prior, fused), strict=True):
                            errors[name].append(_error(what, truth[path]))
            rows += [
                {
                    "gain": gain,
                    "propagate": propagate,
                    "size": size,
                    "estimate": name,
                    **_root_mean_square(of),
                }
                for name, of in errors.items()
            ]
    return rows


@torch.no_grad()
def _found(kalman: ek.norm.Kalmanized, x: Tensor) -> dict[str, tuple[Any, Any, Any]]:
    """Prior, fused and observed moments by layer, of one batch."""
    found: dict[str, tuple[Any, Any, Any]] = {}

    def hear(path: str, *moments: Any) -> None:
        found[path] = moments

    kalman.listen(hear)
    kalman(x)
    kalman.listen(None)
    return found


@torch.no_grad()
def _truth(
    kalman: ek.norm.Kalmanized, fused: dict[str, Statistics], whole: Tensor
) -> dict[str, Statistics]:
    """The moments of what comes to each normalizer, with all held at what they fused."""
    network = kalman.to_batch_norm().eval()
    seen: dict[str, list[BatchMoments]] = {path: [] for path in fused}
    for path, (mean, var) in fused.items():
        layer = network.get_submodule(path)
        layer.running_mean.copy_(mean[0])  # type: ignore[operator]
        layer.running_var.copy_(var[0])  # type: ignore[operator]
        layer.register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(BatchMoments.of(args[0]))
        )
    for part in whole.split(500):
        network(part)
    pooled = {path: BatchMoments.pool(parts) for path, parts in seen.items()}
    return {path: (of.mean, of.var) for path, of in pooled.items()}


def _error(found: Statistics, truth: Statistics) -> Tensor:
    """Mean squares over channels: of the mean in deviations, of the variance's logarithm."""
    mean, var = (t[0].double() for t in found)
    away = (mean - truth[0]).square() / truth[1]
    stretch = (var.clamp_min(torch.finfo(torch.float32).tiny) / truth[1]).log().square()
    live = truth[1] > 0
    return torch.stack([away[live].mean(), stretch[live].mean()])


def _root_mean_square(errors: Sequence[Tensor]) -> Facts:
    mean, var = torch.stack(list(errors)).mean(0).sqrt().tolist()
    return {"mean": mean, "log_var": var}
