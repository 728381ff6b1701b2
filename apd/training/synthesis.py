"""The "new source domain": every training image through MPG-Net's generator, in the layout of its data set."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from apd.console import progress
from apd.data.images import ImageStore
from apd.data.loading import images_in_order
from apd.data.market import FOLDERS, UNKNOWN, Sample, label_of
from apd.errors import InputError
from apd.files import read_json, sample_of, write_bytes, write_json, write_text
from apd.models.trunk import Trunk

_QUALITY = 95  # of the JPEG files, as close to the generator's output as 8 bits in a third of PNG's size
_BATCH = 32
_HALVINGS = 6
_SIGNATURE = "generator.sha256"


class HardImages(nn.Module):
    """What is made of images, held back where it changes their content too much.

    The change of φ is taken for each image alone, as the mean over its elements. Where it is above the limit the image
    is blended with its original: the largest of 64 shares that is found inside by bisection.

    Args:
        change: images (B, 3, H, W) in [0, 1] to such.
        trunk: with φ.
        limit: the largest change of φ; None: none is held back.
    """

    def __init__(self, change: Callable[[Tensor], Tensor], trunk: Trunk | None, limit: float | None) -> None:
        super().__init__()
        self.change, self.trunk, self.limit = change, trunk, limit

    def forward(self, images: Tensor) -> Tensor:
        made = self.change(images)
        if self.limit is None or self.trunk is None:
            return made
        trunk, original = self.trunk, self.trunk(images).shallow

        def inside(share: Tensor) -> Tensor:
            shallow = trunk(torch.lerp(images, made, share)).shallow
            return (shallow - original).abs().flatten(1).mean(1)[:, None, None, None] <= self.limit

        low = torch.zeros(len(images), 1, 1, 1, device=images.device)
        high = torch.ones_like(low)
        low = torch.where(inside(high), high, low)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            fits = inside(middle)
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return torch.lerp(images, made, low)


def noisy(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with normal noise of deviation 1/2, which its pixels alone decide."""
    noise = torch.stack([_noise(image) for image in (images * 255).round().to("cpu", torch.uint8)])
    return (images + noise.to(images.device) / 2).clamp(0, 1)


def _noise(image: Tensor) -> Tensor:
    seed = zlib.crc32(image.numpy().tobytes())
    return torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))


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
    if sample.pid != UNKNOWN and label_of(sample.path.name) != (sample.pid, sample.camid):
        stem = f"{sample.pid:04d}_c{sample.camid}_{stem}"
    return folder / FOLDERS[part] / f"{stem}.jpg"


@torch.no_grad()
def synthesize(
    generator: HardImages,
    samples: Sequence[Sample],
    part: str,
    folder: Path,
    size: tuple[int, int],
    *,
    device: str,
    workers: int = 0,
) -> list[Path]:
    """Write G(x) of every image; those that this generator wrote before of the same originals are kept.

    Args:
        generator: what makes an image of an image.
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
    _forget_changed(folder / f"{part}.sources.json", samples, paths)
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


def _forget_changed(record: Path, samples: Sequence[Sample], paths: Sequence[Path]) -> None:
    """Remove what was made of originals that have other contents now."""
    before: dict[str, str] = read_json(record, {...: str}) if record.exists() else {}
    now = {path.name: sample_of(sample.path) for sample, path in zip(samples, paths, strict=True)}
    for path in paths:
        if before.get(path.name, now[path.name]) != now[path.name]:
            path.unlink(missing_ok=True)
    if before | now != before:
        write_json(record, before | now)


def _sign(folder: Path, generator: HardImages) -> None:
    """Write down which generator the images of a folder are of; another one may not add to them."""
    digest = hashlib.sha256()
    for name, tensor in generator.state_dict().items():
        if not name.startswith("trunk."):
            digest.update(tensor.contiguous().cpu().numpy())
    if generator.limit is not None:
        digest.update(f"{getattr(generator.change, '__name__', '')} {generator.limit!r}".encode())
    path, content = folder / _SIGNATURE, digest.hexdigest() + "\n"
    if path.is_file() and path.read_bytes() != content.encode():
        raise InputError(f"{folder}: has images of another generator; choose another folder, or remove this one")
    write_text(path, content)


def _as_jpeg(picture: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "JPEG", quality=_QUALITY, subsampling=0)
    return content.getvalue()
