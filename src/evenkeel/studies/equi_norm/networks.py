"""Networks of the study: chains, fully connected classifiers, and two larger residual networks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

GROUPS = 25
"""Of the group norms of the fully connected networks."""


def chain(layers: int, width: int, seed: int) -> nn.Sequential:
    """Linear layers and ReLUs without biases, whose weights have log-normal rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for _ in range(layers):
        layer = nn.Linear(width, width, bias=False)
        scales = torch.randn(2 * width + 1, generator=generator).exp()
        with torch.no_grad():
            layer.weight.normal_(generator=generator).div_(width**0.5).mul_(scales[-1])
            layer.weight.mul_(scales[:width, None]).mul_(scales[width:-1])
        modules += [layer, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def fully_connected(intermediate: int, width: int, inputs: int, norm: str) -> nn.Sequential:
    """The published classifier: no biases; so many layers between the first and the last.

    He initialisation; ``norm`` is "batch", "group" or "none".
    """
    norms: dict[str, Callable[[], list[nn.Module]]] = {
        "batch": lambda: [nn.BatchNorm1d(width)],
        "group": lambda: [nn.GroupNorm(GROUPS, width)],
        "none": list,
    }
    modules: list[nn.Module] = [nn.Flatten()]
    for k in range(intermediate + 1):
        layer = nn.Linear(width if k else inputs, width, bias=False)
        modules += [layer, *norms[norm](), nn.ReLU()]
    modules.append(nn.Linear(width, 10, bias=False))
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return nn.Sequential(*modules)


class Block(nn.Module):
    """Convolutions with batch norm, ReLU between them, and a shortcut."""

    def __init__(self, inputs: int, shapes: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, stride = inputs, 1
        for width, kernel, step in shapes:
            conv = nn.Conv2d(before, width, kernel, step, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            before, stride = width, stride * step
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if before != inputs or stride > 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, before, 1, stride, bias=False), nn.BatchNorm2d(before)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.body(x) + self.shortcut(x)
        return y.relu()


def resnet50() -> nn.Sequential:
    """He et al. 2015, 25.6M parameters."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers, inputs = [*stem, nn.MaxPool2d(3, 2, 1)], 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(blocks):
            step = stride if k == 0 else 1
            layers.append(Block(inputs, [(width, 1, 1), (width, 3, step), (4 * width, 1, 1)]))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def resnet18_cifar() -> nn.Sequential:
    """With a stem for 32x32 images, 11.2M parameters."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)]
    layers, inputs = [*layers, nn.ReLU()], 64
    for width, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        for k in range(2):
            layers.append(Block(inputs, [(width, 3, stride if k == 0 else 1), (width, 3, 1)]))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
