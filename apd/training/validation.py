"""CMC and mAP of a network on images, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apd.data.images import ImageStore
from apd.data.loading import images_in_order
from apd.data.market import Sample
from apd.run import WEIGHTS, save_tensors
from apd.training.log import StageLog
from apd.training.sources import split_validation
from apd_kernels import RankMetrics, rank_metrics

_BATCH = 128


class Validation:
    """Keeps the weights with the best mAP on held-out identities of the sources; images of a target have no say.

    Args:
        run: the run's folder.
        held_out: images of each source; empty lists for none.
        size: height and width to resize them to, pixels.
        every: steps between two validations.
        workers: processes that read images.
        best: the best mAP so far.
    """

    def __init__(
        self,
        run: Path,
        held_out: Sequence[Sequence[Sample]],
        size: tuple[int, int],
        *,
        every: int,
        workers: int,
        best: float,
    ) -> None:
        self._run = run
        self._parts = [split_validation(samples) for samples in held_out if samples]
        self._size = size
        self._every = every
        self._workers = workers
        self.best = best

    def __bool__(self) -> bool:
        """Whether anything is held out."""
        return bool(self._parts)

    def due(self, step: int, steps: int) -> bool:
        """Whether to validate after `step` of `steps` steps."""
        return bool(self) and (step % self._every == 0 or step == steps)

    def validate(self, model: nn.Module, step: int, log: StageLog) -> None:
        """Evaluate, write a line, and keep the weights where they are the best so far."""
        found = [evaluate_samples(model, *parts, self._size, self._workers) for parts in self._parts]
        model.train()
        score = sum(result.mAP for result in found) / len(found)
        rank1 = sum(float(result.cmc[0]) for result in found) / len(found)
        log.line(step, validation_map=score, validation_rank1=rank1)
        if score > self.best:
            self.best = score
            save_tensors(self._run / WEIGHTS, model)


def evaluate_samples(
    model: nn.Module, query: Sequence[Sample], gallery: Sequence[Sample], size: tuple[int, int], workers: int
) -> RankMetrics:
    """Cosine distances, images of the query's identity in its own camera left out; puts the model in evaluation mode.

    Args:
        model: images (B, 3, H, W) in [0, 1] to descriptors (B, D).
        query, gallery: the images.
        size: height and width to resize them to, pixels.
        workers: processes that read them.
    """
    model.eval()

    def ids(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        return torch.tensor([s.pid for s in samples]), torch.tensor([s.camid for s in samples])

    (query_ids, query_cams), (gallery_ids, gallery_cams) = ids(query), ids(gallery)
    return rank_metrics(
        _descriptors(model, query, size, workers),
        _descriptors(model, gallery, size, workers),
        query_ids,
        gallery_ids,
        query_cams,
        gallery_cams,
        metric="cosine",
    )


@torch.no_grad()
def _descriptors(model: nn.Module, samples: Sequence[Sample], size: tuple[int, int], workers: int) -> Tensor:
    device = next(model.parameters()).device
    store = ImageStore([sample.path for sample in samples], size, cache=False)
    batches = images_in_order(store, _BATCH, workers)
    return torch.cat([normalize(model(images.to(device)).float()) for images in batches]).cpu()
