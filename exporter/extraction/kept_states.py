"""Stores hidden states on disk, so that a killed extraction can resume.

There is one file per batch in a hidden work folder beside the output, named by the digest of everything the states depend
on: the model's files, and the batch's prompts and images in order. Another model, prompt or batch size gives other names,
so stale states are never read. The folder is removed when the output is written or rejected; only a killed or interrupted
run leaves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ...graphs.digests import BIG, sha256_file
from ...graphs.errors import GuardError
from ...graphs.graph_io import external_files
from ...graphs.package import ModelPackage
from ...graphs.staging import write_file
from ...runtime.generation import Request
from ...runtime.images.image_features import ImageFeatures, Shown
from ...runtime.images.open_picture import picture_bytes


class KeptStates:
    """The work folder of one extraction.

    Args:
        folder: made when the first batch is kept.
        model: digest of what the states come from.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.folder = folder
        self._model = model

    def find(self, batch: Sequence[Request]) -> np.ndarray | None:
        """A batch's states `[batch, layers, d]` float32, if a run before this one kept them."""
        with contextlib.suppress(
            OSError, ValueError, EOFError
        ):  # not there, or cut short by a full disk: read it again
            states = np.load(self._path(batch), allow_pickle=False)
            if states.ndim == 3 and len(states) == len(batch) and states.dtype == np.float32:
                return states
        return None

    def keep(self, batch: Sequence[Request], states: np.ndarray) -> None:
        """Keep a batch's states; a reader sees all of the file or nothing."""
        content = io.BytesIO()
        np.save(content, states)
        write_file(self._path(batch), content.getvalue())

    def _path(self, batch: Sequence[Request]) -> Path:
        digest = hashlib.sha256(self._model.encode())
        for request in batch:
            for part in (request.prompt.encode(), _image(request)):
                digest.update(len(part).to_bytes(8, "little") + part)
        return self.folder / f"{digest.hexdigest()}.npy"


@contextlib.contextmanager
def kept_beside(output: Path, model: str) -> Iterator[KeptStates]:
    """The work folder of `output`; removed when all is done or refused, left there by a kill or an interrupt."""
    kept = KeptStates(output.with_name(f".{output.name}.work"), model)
    try:
        yield kept
    except KeyboardInterrupt as stop:
        batches = len(list(kept.folder.glob("*.npy")))
        if batches:
            stop.add_note(
                f"hidden states are kept in {kept.folder} (batches: {batches}); run the same command again to resume, or "
                "remove that folder"
            )
        raise
    except GuardError:
        shutil.rmtree(kept.folder, ignore_errors=True)
        raise
    shutil.rmtree(kept.folder, ignore_errors=True)


def model_digest(package: ModelPackage) -> str:
    """Of `model_files`."""
    return digest_of(model_files(package))


def model_files(package: ModelPackage) -> list[Path]:
    """Every file that decides what a prompt's states are."""
    return [package.decoder, *external_files(package.decoder), *(path for path, _ in package.files())]


def digest_of(files: Iterable[Path]) -> str:
    """Of small files their content, of weights their size and time of change: reading 14 GB again is what is to be saved."""
    digest = hashlib.sha256()
    for path in sorted(set(files)):
        status = path.stat()
        content = sha256_file(path) if status.st_size < BIG else f"{status.st_size} {status.st_mtime_ns}"
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()


def _image(request: Request) -> bytes:
    """The content of a request's pictures; of several with the length of each, so that no two lists look alike."""
    contents = [_content(image) for image in request.images]
    if len(contents) <= 1:
        return b"".join(contents)
    return b"".join(len(content).to_bytes(8, "big") + content for content in contents)


def _content(image: Shown) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, ImageFeatures):
        return image.content()
    if isinstance(image, (str, Path)):
        return picture_bytes(Path(image))
    if isinstance(image, np.ndarray):
        return f"{image.dtype} {image.shape} ".encode() + np.ascontiguousarray(image).tobytes()
    return f"{image.mode} {image.size} ".encode() + image.tobytes()
