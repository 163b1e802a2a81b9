"""How quaternion weights begin: the four published ways, vectorised."""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from evenkeel.errors import ConfigError, nearest

Init = Literal["isotropic", "orthant", "rayleigh", "cube"]
Scale = Literal["glorot", "he"]


@torch.no_grad()
def quaternion_init_(
    weight: Tensor,
    kind: Init = "isotropic",
    scale: Scale = "glorot",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Fill weights (4, outputs, inputs, ...) with $|w|(\cos\theta + u\sin\theta)$.

    $\theta$ is uniform over the circle. With $\sigma = 1/\sqrt{2(n_{in} + n_{out})}$ (glorot) or
    $1/\sqrt{2 n_{in}}$ (he), where n counts quaternions times the kernel's size:

    - isotropic: $|w|$ is $\sigma\chi_4$, so that $E|w|^2 = 4\sigma^2$, and u uniform over the
      sphere, as Gaudet and Maida have it;
    - cube: the same, but u uniform in a cube before its length is made 1, as in the code of
      Parcollet et al. of 2019;
    - orthant: $|w|$ uniform in $\pm\sigma$, u as in a cube of positive numbers; the code of 2018;
    - rayleigh: $|w|$ by Rayleigh's law, $E|w|^2 = 2\sigma^2$, u as for orthant; for speech.

    Args:
        weight: filled in place.
        kind: one of these.
        scale: of $\sigma$.
        generator: default: torch's global one, as torch's own initialisers.

    References:
        Gaudet and Maida, "Deep quaternion networks", IJCNN 2018; Parcollet et al., "Quaternion
        convolutional neural networks for heterogeneous image processing", ICASSP 2019.
    """
    for name, value, known in (("kind", kind, get_args(Init)), ("scale", scale, get_args(Scale))):
        if value not in known:
            raise ConfigError(f"Unknown {name} {value!r}. {nearest(value, known)}")
    outputs, inputs = weight.shape[1:3]
    area = math.prod(weight.shape[3:])
    fan = inputs + outputs if scale == "glorot" else inputs
    sigma = 1 / math.sqrt(max(1, 2 * fan * area))
    shape = weight.shape[1:]
    like: Any = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}

    def normal(n: int) -> Tensor:
        return torch.randn(n, *shape, generator=generator, **like)

    def uniform(n: int, low: float, high: float) -> Tensor:
        unit: Tensor = torch.rand(n, *shape, generator=generator, **like)
        return unit.mul(high - low).add(low)

    if kind == "orthant":
        modulus = uniform(1, -1, 1)
    else:
        modulus = torch.linalg.vector_norm(normal(2 if kind == "rayleigh" else 4), dim=0)
    lowest = -1 if kind == "cube" else 0
    axis = normal(3) if kind == "isotropic" else uniform(3, lowest, 1)
    theta = uniform(1, -math.pi, math.pi)
    length = torch.linalg.vector_norm(axis, dim=0)
    axis = axis / length.clamp_min(torch.finfo(axis.dtype).tiny)
    quaternions = sigma * modulus * torch.cat([theta.cos(), theta.sin() * axis])
    return weight.copy_(quaternions)
