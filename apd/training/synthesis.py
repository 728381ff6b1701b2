"""The "new source domain": every training image through MPG-Net's generator, in the layout of its data set."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from apd.console import progress
from apd.data.images import ImageStore
from apd.data.loading import images_in_order
from apd.data.market import FOLDERS, Sample, label_of
from apd.errors import InputError
from apd.files import write_bytes, write_text

_QUALITY = 95  # of the JPEG files, as close to the generator's output as 8 bits in a third of PNG's size
_BATCH = 32
_SIGNATURE = "generator.sha256"


def synthesized_folders(folder: Path, sources: Sequence[Path]) -> list[Path]:
    """Where the synthesized images of each source lie: under the source's name, with its number where names repeat."""
    names = [source.name for source in sources]
    unique = len(set(names)) == len(names)
    return [folder / (name if unique else f"{number}-{name}") for number, name in enumerate(names)]


def synthesized_path(folder: Path, part: str, sample: Sample) -> Path:
    """Where the synthesized image of a sample lies: the original's name, ending in .jpg, so that its identity stays.

    An original whose name does not say identity and camera as Market-1501's do gets them in front of its name.
    """
    stem = sample.path.stem
    if label_of(sample.path.name) != (sample.pid, sample.camid):
        stem = f"{sample.pid:04d}_c{sample.camid}_{stem}"
    return folder / FOLDERS[part] / f"{stem}.jpg"


@torch.no_grad()
def synthesize(
    generator: nn.Module,
    samples: Sequence[Sample],
    part: str,
    folder: Path,
    size: tuple[int, int],
    *,
    device: str,
    workers: int = 0,
) -> list[Path]:
    """Write G(x) of every image; those that this generator wrote before are kept, so that an interrupted run goes on.

    Args:
        generator: images in [0, 1] to such, in evaluation mode.
        samples: the images x.
        part: ``"train"``, ``"query"`` or ``"gallery"``: the folder of the layout.
        folder: of the new data set.
        size: height and width of the images, pixels.
        device: where the generator is.
        workers: processes that read images.

    Returns:
        the written files, in the order of the samples.

    Raises:
        InputError: an image cannot be read, two would get one name, or the folder is that of the originals or has
            images of another generator.
    """
    paths = [synthesized_path(folder, part, sample) for sample in samples]
    if len(set(paths)) < len(paths):
        raise InputError(f"{samples[0].path.parent}: expected images whose names differ by more than their endings")
    target = folder / FOLDERS[part]
    if target.resolve() in {sample.path.parent.resolve() for sample in samples}:
        raise InputError(f"{folder}: holds the originals; choose another folder for the synthesized images")
    target.mkdir(parents=True, exist_ok=True)
    _sign(folder, generator)
    missing = [i for i, path in enumerate(paths) if not path.is_file()]
    store = ImageStore([samples[i].path for i in missing], size, cache=False)
    waiting = iter(missing)
    with progress(f"synthesize {part}", len(missing)) as advance:
        for images in images_in_order(store, _BATCH, workers):
            made = (generator(images.to(device)) * 255).round().clamp(0, 255).to(torch.uint8)
            for picture in made.permute(0, 2, 3, 1).cpu().numpy():
                write_bytes(paths[next(waiting)], _as_jpeg(picture))
            advance(len(made))
    return paths


def _sign(folder: Path, generator: nn.Module) -> None:
    """Write down which generator the images of a folder are of; another one may not add to them."""
    digest = hashlib.sha256()
    for tensor in generator.state_dict().values():
        digest.update(tensor.contiguous().cpu().numpy())
    path, content = folder / _SIGNATURE, digest.hexdigest() + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") != content:
        raise InputError(f"{folder}: has images of another generator; choose another folder, or remove this one")
    write_text(path, content)


def _as_jpeg(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=_QUALITY, subsampling=0)
    return content.getvalue()
