"""CMC and mAP of a network on images, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from apd.data.images import ImageStore
from apd.data.loading import images_in_order
from apd.data.market import Sample
from apd_kernels import RankMetrics, rank_metrics

_BATCH = 128


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
