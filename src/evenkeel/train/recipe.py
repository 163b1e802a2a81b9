"""How the reference networks are trained, each by its name alone."""

from dataclasses import dataclass, replace

from evenkeel.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Data, architecture and the settings of :func:`evenkeel.train.fit`.

    Attributes:
        architecture: a name that :func:`evenkeel.models.build` knows.
        data: "digits", or the name of a published set.
        epochs: passes over the training data.
        batch_size: samples per step, over all processes.
        learning_rate: peak of the one-cycle schedule.
        norm: a name in :data:`evenkeel.models.norms.NORMS`; "group" and "none" want a lower
            learning rate.
        normalization_batch: samples that are normalized together; None for all of a batch.
        weight_standard: whether the convolutions' weights are standardized.
        task: "classify", "segment" or "detect": what is learnt, and measured at the end.
        augment: random crops of images padded by 4 pixels, and mirror images; pictures to segment
            or to detect in are always varied, as by :func:`evenkeel.train.crops`.
        precision: as lightning-fabric names it: "32-true" or "bf16-mixed".
        seed: of initialisation, order and augmentation.
    """

    architecture: str
    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    norm: str = "batch"
    normalization_batch: int | None = None
    weight_standard: bool = False
    task: str = "classify"
    augment: bool = False
    precision: str = "32-true"
    seed: int = 0


RECIPES: dict[str, Recipe] = {
    "digits": Recipe(
        architecture="resnet8_digits", data="digits", epochs=12, batch_size=64, learning_rate=0.2
    ),
    "cifar10": Recipe(
        architecture="resnet14_cifar10",
        data="cifar10",
        epochs=30,
        batch_size=128,
        learning_rate=0.4,
        augment=True,
        precision="bf16-mixed",
    ),
    "nuclei": Recipe(
        architecture="unet",
        data="nuclei",
        task="segment",
        epochs=60,
        batch_size=16,
        learning_rate=0.1,
        precision="bf16-mixed",
    ),
    "bccd": Recipe(
        architecture="centre_detector",
        data="bccd",
        task="detect",
        epochs=80,
        batch_size=8,
        learning_rate=0.01,
        precision="bf16-mixed",
    ),
}
for _norm, _rate in (("group", 0.2), ("none", 0.1)):
    RECIPES[f"cifar10_{_norm}"] = replace(RECIPES["cifar10"], norm=_norm, learning_rate=_rate)


def recipe(name: str) -> Recipe:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ConfigError(f"Unknown recipe {name!r}. {nearest(name, RECIPES)}")
    return RECIPES[name]
