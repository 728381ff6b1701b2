"""CMC and mAP against a gallery that does not fit the memory: pieces on disk, read twice, with a progress bar.

    python examples/rank_shards.py --images 10000000 --folder /data/gallery

Writes a gallery of drawn features as float16 files, 512 numbers an image, unless the folder has it already; each file
is mapped into memory while its turn lasts. What is held beside one piece is the queries and a few numbers per positive
pair, whatever the number of images.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from apd_kernels import RankAccumulator

QUERIES, DIMENSION, IDENTITIES, CAMERAS = 200, 512, 2000, 6


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, identities and cameras; most images show nobody who is asked for."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((IDENTITIES, DIMENSION), dtype=np.float32)
    known = generator.random(count) < 0.02
    ids = np.where(known, generator.integers(1, IDENTITIES, count), 0)
    features = generator.standard_normal((count, DIMENSION), dtype=np.float32)
    features[known] += 0.5 * centres[ids[known]]
    return features.astype(np.float16), ids, generator.integers(0, CAMERAS, count)


def write_pieces(folder: Path, images: int, piece: int) -> list[Path]:
    """The files of the features; identities and cameras lie beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, start in enumerate(range(0, images, piece), 1):
        file, count = folder / f"piece_{number:05}.npy", min(piece, images - start)
        if not file.exists() or len(np.load(file, mmap_mode="r")) != count:
            features, ids, cams = draw(count, number)
            np.save(file.with_suffix(".labels.npy"), np.stack([ids, cams]))
            np.save(file.with_suffix(".part.npy"), features)
            file.with_suffix(".part.npy").rename(file)
        files.append(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--piece", type=int, default=50_000, help="images of a file")
    parser.add_argument("--folder", type=Path, help="where the gallery is or goes; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, Progress() as progress:
        files = write_pieces(arguments.folder or Path(temporary), arguments.images, arguments.piece)
        query, query_ids, query_cams = draw(100 * QUERIES, 1_000_000)
        asked = np.flatnonzero(query_ids)[:QUERIES]
        ranks = RankAccumulator(*(torch.from_numpy(x[asked]) for x in (query, query_ids, query_cams)))
        for name, step in (("positives", ranks.add_positives), ("counting", ranks.count)):
            for file in progress.track(files, description=name):
                ids, cams = np.load(file.with_suffix(".labels.npy"))
                features = torch.from_numpy(np.load(file, mmap_mode="c"))  # copy on write: nothing is written
                step(features, torch.from_numpy(ids), torch.from_numpy(cams))
        result = ranks.compute()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{arguments.images} images: mAP {result.mAP:.4f}, rank-1 {result.cmc[0]:.4f}; at most {peak:.1f} GB held")


if __name__ == "__main__":
    main()
