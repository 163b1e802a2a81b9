"""Downloads that go on where they were cut off, and are trusted only by their checksums."""

import gzip
import hashlib
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from evenkeel.data.sets import check, data_root, file_state, standard_set
from evenkeel.errors import ConfigError, StoreError
from evenkeel.files import require_writable_folder, write_atomically

ATTEMPTS = 5
CHUNK = 1 << 20
Progress = Callable[[str, int, int], None]


def fetch(
    name: str,
    root: str | Path | None = None,
    *,
    mirror: str | None = None,
    progress: Progress = lambda file, done, total: None,
) -> Path:
    """Download what is missing of a data set; returns its folder.

    A file is there whole, with the right checksum, or not at all. A download that was cut off, by
    the network or with the program, is continued by the next call.

    Args:
        name: of the set.
        root: the data root; default by the environment.
        mirror: a URL below which the archives lie, instead of their own.
        progress: called with an archive's name, bytes done and bytes in all.

    Raises:
        StoreError: the server cannot be reached, or the folder cannot be written.
        ConfigError: what came has another checksum.
    """
    chosen = standard_set(name)
    if not chosen.urls and set(check(name, root).values()) == {"ok"}:
        return data_root(root) / chosen.folder
    if not chosen.urls:
        raise ConfigError(
            f"'{name}' is nowhere offered in this layout; put it below the data root yourself: "
            f"{', '.join(f'{chosen.folder}/{file}' for file in chosen.files)}. {chosen.notice}"
        )
    folder = require_writable_folder(data_root(root) / chosen.folder)
    for url in chosen.urls:
        archive = url.rsplit("/", 1)[1]
        wanted = _wanted(archive, chosen.files)
        state = check(name, folder.parent)
        if all(state[file] == "ok" for file in wanted):
            continue
        source = f"{mirror.rstrip('/')}/{archive}" if mirror else url
        path = _download(source, folder / f".{archive}.part", archive, progress)
        try:
            if archive in chosen.files:
                _put_in_place(path, folder / archive, chosen.files[archive], source)
                continue
            if archive.endswith(".zip"):
                _unfold(path, folder / wanted[0], chosen.files[wanted[0]], source)
                continue
            for file, content in _unpacked(path, archive, wanted):
                if hashlib.sha256(content).hexdigest() != chosen.files[file]:
                    raise _not_the_published(file, source)
                write_atomically(folder / file, content)
        finally:
            path.unlink()  # a whole archive that is wrong must not be continued
    return folder


def _wanted(archive: str, files: object) -> list[str]:
    """The set's files that an archive holds."""
    names = list(files)  # type: ignore[call-overload]
    if archive in names:
        return [archive]
    return names if archive.endswith(".tar.gz") else [Path(archive).stem]


def _not_the_published(file: str, source: str) -> ConfigError:
    return ConfigError(
        f"{file} from {source} has another checksum than the published set; it was not kept. Try "
        f"again, or another mirror."
    )


def _put_in_place(path: Path, file: Path, wanted: str, source: str) -> None:
    """Move an image there when it is the right one."""
    image = path.rename(path.with_suffix(file.suffix))
    try:
        if file_state(image, wanted) != "ok":
            raise _not_the_published(file.name, source)
        write_atomically(file, image.read_bytes())
    finally:
        image.rename(path)


def _unfold(path: Path, folder: Path, wanted: str, source: str) -> None:
    """Unpack a folder of images beside its place, and move it there when it is the right one."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as beside:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(beside)
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
            raise ConfigError(f"{source} is no whole archive: {error}. Try again.") from error
        new = Path(beside) / folder.name
        if not new.is_dir() or file_state(new, wanted) != "ok":
            raise _not_the_published(folder.name, source)
        if folder.exists():  # it was damaged
            folder.rename(Path(beside) / "damaged")
        new.rename(folder)


def _unpacked(path: Path, archive: str, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    try:
        if not archive.endswith(".tar.gz"):
            yield wanted[0], gzip.decompress(path.read_bytes())
            return
        with tarfile.open(path) as tar:
            for member in tar:
                file = member.name.rsplit("/", 1)[-1]
                if file in wanted and (reader := tar.extractfile(member)) is not None:
                    yield file, reader.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{archive} is no whole archive: {error}. Try again.") from error


def _download(url: str, part: Path, archive: str, progress: Progress) -> Path:
    for attempt in range(ATTEMPTS):
        try:
            if _continue(url, part, archive, progress):
                return part
        except urllib.error.HTTPError as error:
            if error.code == 416 and part.exists():  # nothing is left: it was whole already
                return part
            raise StoreError(f"Cannot fetch {url}: {error}.") from error
        except OSError as error:
            if attempt == ATTEMPTS - 1:
                raise StoreError(
                    f"Cannot fetch {url}: {error}. What came is kept; the same command goes on."
                ) from error
        time.sleep(min(2**attempt, 8) / 4)
    raise StoreError(f"{url} broke off {ATTEMPTS} times; the same command goes on from there.")


def _continue(url: str, part: Path, archive: str, progress: Progress) -> bool:
    """Add to the part file what the server still has; whether it is whole then."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as reply:
        if have and reply.status != 206:  # the server starts anew
            have = 0
        total = have + int(reply.headers.get("Content-Length") or 0)
        with part.open("ab" if have else "wb") as file:
            while chunk := reply.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                progress(archive, have, total)
    return have >= total
