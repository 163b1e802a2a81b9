"""How much of a picture comes back, and of its colour."""

import torch
from torch import Tensor

from evenkeel.errors import MissingExtraError


def psnr(picture: Tensor, target: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, for a peak of 1."""
    return float(-10 * (picture - target).square().mean().log10())


def ssim(picture: Tensor, target: Tensor) -> float:
    """Structural similarity, mean over channels; Gaussian window of 11, deviation 1.5."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise MissingExtraError("evenkeel study quaternion", "tasks") from error
    value = structural_similarity_index_measure(picture[None], target[None], data_range=1.0)
    return float(value)  # type: ignore[arg-type]


def chroma(picture: Tensor) -> Tensor:
    """What of each pixel is not grey: its channels less their mean, (3, H, W)."""
    return picture - picture.mean(0, keepdim=True)


def measured(picture: Tensor, target: Tensor) -> dict[str, float]:
    """All of it, and the energy of the chroma as a share of the target's, and its correlation."""
    picture = picture.clamp(0, 1).mul(255).round().div(255)  # as it would be stored
    own, wanted = chroma(picture).double().flatten(), chroma(target).double().flatten()
    energy = float(own.square().sum() / wanted.square().sum())
    return {
        "psnr": psnr(picture, target),
        "ssim": ssim(picture, target),
        "chroma_ratio": energy,
        "chroma_correlation": float(torch.corrcoef(torch.stack([own, wanted]))[0, 1]),
    }
