"""From what a user names to a network with its weights."""

from torch import nn

from evenkeel import models
from evenkeel.audit.names import import_from
from evenkeel.errors import ConfigError, nearest
from evenkeel.models.registry import known
from evenkeel.saving import load, load_tensors, read


def network_from(model: str, weights: str | None) -> nn.Module:
    """The network of ``module:factory``, a named architecture, or a file that ``save`` wrote."""
    if model.endswith(".safetensors"):
        if weights is not None:
            raise ConfigError(f"{model} has its weights in it; leave --weights out.")
        network: nn.Module = load(model)
        return network
    if weights is None:
        raise ConfigError(
            f"{model} needs its trained weights: --weights FILE.safetensors, or --weights own "
            "where the factory loads them itself."
        )
    if ":" in model:
        network = made_by(model)
    elif model in known():
        network = models.build(model)
    else:
        raise ConfigError(
            f"Unknown network {model!r}. {nearest(model, known())} Your own is named as "
            "module:factory."
        )
    if weights != "own":
        tensors, _ = read(weights)
        load_tensors(network, tensors, weights)
    return network.eval()


def made_by(model: str) -> nn.Module:
    """The network that ``module:factory`` gives."""
    made = import_from(model)
    network = made if isinstance(made, nn.Module) else made()
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{model} must give a torch.nn.Module; it gives {type(network).__name__}."
        )
    return network
