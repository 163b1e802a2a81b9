"""One auto-encoder, trained on one grey picture, and what it makes of colour."""

import functools
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenkeel.data.pictures import middle, pictures
from evenkeel.files import write_atomically
from evenkeel.models import ColourAutoEncoder, build
from evenkeel.quaternion import from_quaternion, to_quaternion
from evenkeel.saving import load, save
from evenkeel.studies.quaternion.measures import measured, psnr


def trained(
    folder: Path,
    kind: Any,
    seed: int,
    steps: int,
    learning_rate: float,
    crop: int | None,
    picture: str,
    kept: Path | None,
) -> dict[str, Any]:
    """Train on one picture in grey, a step each time it is seen; the measures on all others.

    ``crop`` takes so many pixels from the middle of every picture. The network is written to
    ``kept``.
    """
    images = {name: _cropped(image, crop) for name, image in _pictures(folder).items()}
    grey = from_quaternion(to_quaternion(images[picture], "gray"))[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build("colour_autoencoder", kind=kind)
    assert isinstance(network, ColourAutoEncoder)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    seen = grey[:, :1] if kind == "shared" else grey  # of equal channels one teaches the same
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = network.loss(seen)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        found = {name: network(image[None])[0] for name, image in images.items()}
        on_grey = psnr(network(grey)[0].clamp(0, 1), grey[0])
    if kept is not None:
        save(network, kept, seed=seed, steps=steps)
    return {
        "kind": kind,
        "seed": seed,
        "parameters": sum(p.numel() for p in network.parameters()),
        "losses": losses[:: max(1, steps // 100)],
        "grey_psnr": on_grey,
        "pictures": {
            name: measured(found[name], image) for name, image in images.items() if name != picture
        },
    }


def side_by_side(folder: Path, networks: dict[str, Path], names: list[str], out: Path) -> None:
    """A WebP of pictures, a row each: as they are, and as each network gives them back."""
    from PIL import Image

    rows = []
    for name in names:
        image = _cropped(_pictures(folder)[name], None)
        columns = [image]
        for path in networks.values():
            with torch.no_grad():
                columns.append(load(path)(image[None])[0].clamp(0, 1))
        rows.append(torch.cat([_small(column) for column in columns], 2))
    sheet = torch.cat(rows, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "WEBP", quality=85)
    write_atomically(out, file.getvalue())


def _small(image: Tensor) -> Tensor:
    width = 240
    size = (round(image.shape[1] * width / image.shape[2]), width)
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


@functools.lru_cache(maxsize=2)
def _pictures(folder: Path) -> dict[str, Tensor]:
    return pictures(folder)


def _cropped(image: Tensor, crop: int | None) -> Tensor:
    if crop is not None:
        return middle(image, crop)
    height, width = (n - n % 4 for n in image.shape[1:])
    return image[:, :height, :width]
