"""Published data sets by name: where they lie, what they must hold, how they are read."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evenkeel.data.cifar10 import cifar10, cifar10_train
from evenkeel.data.dataset import Data
from evenkeel.data.folder import pictures_digest
from evenkeel.data.mnist import mnist, mnist_train
from evenkeel.errors import ConfigError, nearest

ROOT_VARIABLE = "EVENKEEL_DATA"


@dataclass(frozen=True)
class StandardSet:
    """A published data set in its own layout.

    Attributes:
        folder: below the data root.
        files: sha256 of each file; of a folder of images, that of its pictures.
        urls: archives that hold the files: a tar.gz of the folder, a .gz of one file, or a .zip of
            a folder of images.
        notice: source and licence, in a sentence.
        read: what an audit needs, from the folder; None where it has no classes that stay.
        read_train: all training inputs and labels, from the folder.
    """

    folder: str
    files: Mapping[str, str]
    urls: tuple[str, ...]
    notice: str
    read: Callable[[Path], Data] | None = None
    read_train: Callable[[Path], tuple[Tensor, Tensor]] | None = None


SETS: Mapping[str, StandardSet] = {
    "cifar10": StandardSet(
        folder="cifar-10-batches-bin",
        files={
            "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
            "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
            "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
            "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
            "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
            "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
        },
        urls=("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
        notice="CIFAR-10, Krizhevsky, 'Learning Multiple Layers of Features from Tiny Images', "
        "2009. Its authors state no licence and ask to be cited.",
        read=cifar10,
        read_train=cifar10_train,
    ),
    "mnist": StandardSet(
        folder="mnist",
        files={
            "train-images-idx3-ubyte": (
                "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
            ),
            "train-labels-idx1-ubyte": (
                "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
            ),
            "t10k-images-idx3-ubyte": (
                "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
            ),
            "t10k-labels-idx1-ubyte": (
                "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
            ),
        },
        urls=tuple(
            f"https://ossci-datasets.s3.amazonaws.com/mnist/{name}.gz"
            for name in (
                "train-images-idx3-ubyte",
                "train-labels-idx1-ubyte",
                "t10k-images-idx3-ubyte",
                "t10k-labels-idx1-ubyte",
            )
        ),
        notice="MNIST, LeCun and Cortes; CC BY-SA 3.0 by common account.",
        read=mnist,
        read_train=mnist_train,
    ),
    "omniglot": StandardSet(
        folder="omniglot",
        files={
            "images_background": (
                "502c93cb01eab7a099404eca1a15fa99008c119e04427a9b3170d4475b96dd24"
            ),
            "images_evaluation": (
                "0a367bcccf8e740c5d66fa1fd8156b93382fe55555e6c4dc15abe19933e7c179"
            ),
        },
        urls=tuple(
            f"https://github.com/brendenlake/omniglot/raw/master/python/images_{side}.zip"
            for side in ("background", "evaluation")
        ),
        notice="Omniglot, Lake et al., 'Human-level concept learning through probabilistic program "
        "induction', Science 350, 2015; MIT licence.",
    ),
}


def standard_set(name: str) -> StandardSet:
    """The set of that name."""
    if name not in SETS:
        raise ConfigError(f"Unknown data set {name!r}. {nearest(name, SETS)}")
    return SETS[name]


def data_root(root: str | Path | None = None) -> Path:
    """Where data sets lie: as given, or by the environment."""
    chosen = root or os.environ.get(ROOT_VARIABLE)
    if not chosen:
        raise ConfigError(
            f"Where do the data sets lie? Give --data-root FOLDER, or set {ROOT_VARIABLE}."
        )
    return Path(chosen)


def folder_of(name: str, root: str | Path | None = None) -> Path:
    """The folder of a set whose files are all there; their content is what ``check`` is for."""
    chosen = standard_set(name)
    folder = data_root(root) / chosen.folder
    missing = [file for file in chosen.files if not (folder / file).exists()]
    if missing:
        raise ConfigError(
            f"The data set '{name}' is not complete in {folder}: {missing[0]}"
            + (f" and {len(missing) - 1} more are" if len(missing) > 1 else " is")
            + f" missing. Fetch it: evenkeel data fetch {name} --data-root {folder.parent}"
        )
    return folder


def read_set(name: str, root: str | Path | None = None) -> Data:
    """What an audit needs of a set."""
    read = standard_set(name).read
    if read is None:
        raise ConfigError(f"'{name}' is for few-shot episodes: see evenkeel fewshot.")
    return read(folder_of(name, root))


def read_training_set(name: str, root: str | Path | None = None) -> tuple[Tensor, Tensor]:
    """All training inputs and labels of a set."""
    read = standard_set(name).read_train
    if read is None:
        raise ConfigError(f"'{name}' is for few-shot episodes: see evenkeel fewshot train.")
    return read(folder_of(name, root))


def check(name: str, root: str | Path | None = None) -> dict[str, str]:
    """State of each file of a set: "ok", "missing", or "damaged" (its checksum is another)."""
    chosen = standard_set(name)
    folder = data_root(root) / chosen.folder
    return {file: file_state(folder / file, wanted) for file, wanted in chosen.files.items()}


def sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path, wanted: str) -> str:
    """State of a file, or of a folder of images: "ok", "missing" or "damaged"."""
    if not path.exists():
        return "missing"
    try:
        found = pictures_digest(path) if path.is_dir() else sha256(path)
    except ConfigError:  # a picture that cannot be read
        return "damaged"
    return "ok" if found == wanted else "damaged"
