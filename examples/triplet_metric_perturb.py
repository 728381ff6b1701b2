"""A plain triplet training loop, and the three lines that add hard samples by `metric_perturb`.

    python examples/triplet_metric_perturb.py

Images are generated: a pattern for each identity, seen through one camera in training and through another at test,
both with noise. Prints mAP on identities that were not trained on, without and with the three lines. It shows where
they go, not what they bring: on patterns in noise the two figures differ by no more than two seeds do.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from apd_kernels import metric_perturb, rank_metrics, triplet_loss

IDENTITIES, IMAGES, SIZE = 80, 8, (3, 16, 8)


def generate(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, identities, cameras; half of an identity's images are taken by each of two cameras."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(IDENTITIES, *SIZE, generator=generator)
    labels = torch.arange(IDENTITIES).repeat_interleave(IMAGES)
    cameras = torch.arange(len(labels)) % 2
    tint = torch.randn(2, SIZE[0], 1, 1, generator=generator)
    noise = torch.randn(len(labels), *SIZE, generator=generator)
    return patterns[labels] + tint[cameras] + 1.5 * noise, labels, cameras


def train(images: Tensor, labels: Tensor, seed: int, *, perturb: bool) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(384, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        chosen = labels.unique()[torch.randperm(len(labels.unique()))[:16]]  # 16 identities × 4 images
        batch = torch.cat([(labels == identity).nonzero()[torch.randperm(IMAGES)[:4], 0] for identity in chosen])
        targets = labels[batch]
        features = model(images[batch])
        loss = triplet_loss(features, targets, margin=None)
        if perturb:
            hard = metric_perturb(features, targets, epsilon=0.1, epsilon_mode="relative", steps=5)  # 1
            hard_loss = triplet_loss(hard, targets, margin=None)  # 2
            loss = loss + 0.5 * hard_loss  # 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    images, labels, cameras = generate(seed)
    trained = labels < IDENTITIES // 2
    query, gallery = ~trained & (cameras == 0), ~trained & (cameras == 1)
    for perturb in (False, True):
        model = train(images[trained], labels[trained], seed, perturb=perturb)
        with torch.no_grad():
            features = model(images)
        result = rank_metrics(
            features[query], features[gallery], labels[query], labels[gallery], cameras[query], cameras[gallery]
        )
        print(f"{'with' if perturb else 'without'} metric_perturb: mAP {result.mAP:.3f}, rank-1 {result.cmc[0]:.3f}")


if __name__ == "__main__":
    main()
