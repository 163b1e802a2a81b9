"""Batch Kalman normalization for a network that is there already."""

import copy
import functools
from typing import Any, Literal, get_args

from torch import nn

from evenkeel.errors import ConfigError, nearest
from evenkeel.graph import capture
from evenkeel.graph.prediction import Prediction, plan
from evenkeel.norm.activation import NormAct
from evenkeel.norm.batch_kalman import BatchKalmanNorm
from evenkeel.norm.convert import Conversion, convert_, in_place_of
from evenkeel.norm.tape import LinearTransition, Listener, Propagate, Tapes

TRANSITIONS = ("layer", "linear")


class Kalmanized(nn.Module):
    """A network whose batch norms tell the ones behind them what to expect.

    In train mode each forward opens a tape, on which layers write what they found and read what
    those before have found; it is closed with the forward. In eval mode there is none.

    Attributes:
        network: a copy of the user's, with :class:`BatchKalmanNorm` for batch norm. Called by
            itself it does without priors.
        priors: by normalizer, the normalizers that its prior is made from.
        without: the others, and why they have none.
    """

    def __init__(
        self,
        network: nn.Module,
        tapes: Tapes,
        priors: dict[str, list[str]],
        without: dict[str, str],
        kinds: dict[str, type[nn.Module]],
    ) -> None:
        super().__init__()
        self.network = network
        self.priors = priors
        self.without = without
        self._tapes = tapes
        self._kinds = kinds  # what each normalizer was

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's."""
        if not self.training:
            return self.network(*args, **kwargs)
        before = self._tapes.open()
        try:
            return self.network(*args, **kwargs)
        finally:
            self._tapes.close(before)

    def listen(self, listener: Listener | None) -> None:
        """Have one hear path, prior, fused and observed moments of every layer in train mode."""
        self._tapes.listener = listener

    def to_batch_norm(self) -> nn.Module:
        """A copy of the network with torch's batch norms: what this one is in eval mode."""
        network = copy.deepcopy(self.network)
        for path, layer in list(network.named_modules(remove_duplicate=False)):
            if isinstance(layer, BatchKalmanNorm):
                kind = functools.partial(self._kinds[layer.path], affine=layer.weight is not None)
                plain = in_place_of(layer, kind)
                if layer.running_var.dtype != plain.running_var.dtype:
                    plain = plain.float()  # what is kept in float32 may not fit into half
                    plain.running_mean.copy_(layer.running_mean)  # type: ignore[operator]
                    plain.running_var.copy_(layer.running_var)  # type: ignore[operator]
                network.set_submodule(path, plain)
        return network

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"priors": self.priors, "without": self.without}

    def table(self) -> str:
        """A row per normalizer."""
        said = {path: "from " + ", ".join(of) for path, of in self.priors.items()}
        said |= {path: f"no prior: {why}" for path, why in self.without.items()}
        width = max(map(len, said))
        return "\n".join(f"{path:<{width}}  {what}" for path, what in said.items())


def kalmanize(
    model: nn.Module,
    example_inputs: Any,
    *,
    gain: float = 0.1,
    learn_gain: bool = False,
    normalization_batch: int | None = None,
    transition: Literal["layer", "linear"] = "layer",
    propagate: Propagate = "observed",
) -> Kalmanized:
    r"""Tell every batch norm of a network what the layers before predict of its statistics.

    The network is captured once, to learn which normalizers come before which and by what way.
    Through ReLU and other activations, convolution with its borders, linear layers, sums, products,
    concatenation, pooling, flattening and dropout, mean and variance follow in closed form or by
    quadrature; nothing is drawn, and no activations are kept. A normalizer with anything else on
    the way, or with the network's input, has no prior and works on the batch alone; all are listed.

    Use when a network with batch norm must train with statistics of a few samples. Not for
    networks without batch norm, and not to save time: see the method card for what it gains.

    Args:
        model: any network that torch can export; left as it is.
        example_inputs: a tensor, or the tuple of the network's positional arguments, of any batch
            size.
        gain: weight of the observed statistics, see :class:`BatchKalmanNorm`.
        learn_gain: whether each layer with a prior learns its own, from there on.
        normalization_batch: samples that are normalized together; default: the batch.
        transition: how moments come from one normalizer to the next: by the "layer" in between, as
            in the authors' code, or by a learned "linear" map with noise, as in their paper.
        propagate: which moments a normalizer is taken to give. "observed": those that the batch's
            have once normalized, $\beta + \gamma(m_o - m)/\sqrt{v}$ and $\gamma^2 v_o/v$. "raw":
            the fused ones $m, v$, as if it had not normalized, as in the authors' code.
            "normalized": $\beta, \gamma^2$, so that all priors are functions of the weights alone.

    Raises:
        ConfigError: an option out of its range; no batch norm to give a prior to.
        GraphError: the network cannot be exported.

    Examples:
        >>> import torch, evenkeel as ek
        >>> from torch import nn
        >>> net = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        ...     nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
        ... )
        >>> kalman = ek.norm.kalmanize(net, torch.zeros(1, 3, 8, 8))
        >>> print(kalman.table())
        4  from 1
        1  no prior: it reads the network's input
        >>> kalman(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])

    References:
        Wang et al., "Batch Kalman Normalization", arXiv 1802.03133, and "Kalman Normalization",
        NeurIPS 2018.
    """
    for name, value, known in (
        ("transition", transition, TRANSITIONS),
        ("propagate", propagate, get_args(Propagate)),
    ):
        if value not in known:
            raise ConfigError(f"Unknown {name} {value!r}. {nearest(value, known)}")
    network = copy.deepcopy(model)
    captured = capture(network, example_inputs)
    make = functools.partial(BatchKalmanNorm, gain=gain, normalization_batch=normalization_batch)
    conversion = convert_(network, make)
    prediction = plan(captured, conversion.converted)
    tapes = Tapes(network, prediction, propagate)
    priors, without = _sources(prediction, conversion)
    for path in conversion.converted:
        layer = _normalizer(network, path)
        layer.join(tapes, path)
        if getattr(conversion.old[path], "affine", True) is False:
            layer.weight, layer.bias = None, None  # type: ignore[assignment]
        if learn_gain and path in priors:
            layer.learn_gain_()
        if transition == "linear" and path in priors:
            channels = [_normalizer(network, source).num_features for source in priors[path]]
            linear = LinearTransition(channels, layer.num_features)
            layer.transition = linear.to(layer.running_mean)
    kinds = {path: _kind(old) for path, old in conversion.old.items()}
    return Kalmanized(network, tapes, priors, without, kinds).train(model.training)


def _kind(old: nn.Module) -> type[nn.Module]:
    kinds = nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
    return next((kind for kind in kinds if isinstance(old, kind)), nn.BatchNorm2d)


def _sources(
    prediction: Prediction, conversion: Conversion
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """By normalizer, those that its prior is made from, or why there is none."""
    paths = {place.step: place.path for place in prediction.places}
    priors: dict[str, list[str]] = {}
    without = dict(conversion.skipped)
    for place in prediction.places:
        if place.prior is not None:
            priors[place.path] = [paths[step] for step in prediction.sources(place.prior)]
        elif place.why is not None:
            without[place.path] = place.why
    run = set(paths.values())
    without |= {path: "it does not run" for path in conversion.converted if path not in run}
    return priors, {path: why for path, why in without.items() if path not in priors}


def _normalizer(network: nn.Module, path: str) -> BatchKalmanNorm:
    module = network.get_submodule(path)
    norm = module.norm if isinstance(module, NormAct) else module
    assert isinstance(norm, BatchKalmanNorm)
    return norm
