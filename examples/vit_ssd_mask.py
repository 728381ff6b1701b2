"""A small vision transformer, and what `ssd_mask` adds to it: APD's self-perturbation in one pass of the shared trunk.

    python examples/vit_ssd_mask.py

The patch embeddings F are split by attention into an identity-relevant part K and the rest, NK; K* = K + the NK of an
image of another identity. One pass takes K, NK and K* together. K must identify, K* as well, NK must not. At test K is
all there is. Images are generated; prints the losses while it trains.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from apd_kernels import DisentangledMaps, nn, triplet_loss

WIDTH, PATCHES = 48, (4, 2)


class SmallViT(torch.nn.Module):
    """Patch embedding, encoder, mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.position = torch.nn.Parameter(0.02 * torch.randn(1, PATCHES[0] * PATCHES[1], WIDTH))
        layer = torch.nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = torch.nn.ModuleList(torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3))
        self.mask = nn.SSDMask(stacked=True)
        for convolution in self.attention:
            torch.nn.init.constant_(convolution.bias, 2.0)  # K starts near 0.9 F

    def forward(self, images: Tensor, labels: Tensor | None = None) -> DisentangledMaps:
        """Descriptors of K, NK and, in training, K*, each (B, WIDTH)."""
        features = self.embedding(images)
        logits = [convolution(features) for convolution in self.attention]
        maps = self.mask(features, logits, labels)  # (3B, …) in training, (2B, …) at test
        tokens = self.encoder(maps.flatten(2).transpose(1, 2) + self.position)
        parts = tokens.mean(1).split(len(images))
        return DisentangledMaps(parts[0], parts[1], parts[2] if len(parts) == 3 else None)


def batch() -> tuple[Tensor, Tensor]:
    """8 identities × 4 images; an identity is the colours of four stripes, the same in every batch."""
    colours = torch.randn(40, 3, 4, 1, generator=torch.Generator().manual_seed(0))
    labels = torch.randperm(40)[:8].repeat_interleave(4)
    stripes = colours[labels].repeat_interleave(8, 2)
    return stripes + torch.randn(32, 3, 1, 1) + torch.randn(32, 3, 32, 16), labels  # light and noise of each image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = SmallViT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(arguments.steps):
        images, labels = batch()
        f = model(images, labels)
        # One mining for all three: the pairs of K are the pairs of K* and, exchanged, of NK.
        keep, pairs = triplet_loss(f.relevant, labels, margin=None, return_indices=True)
        defend = triplet_loss(f.perturbed, labels, margin=None, indices=pairs)
        remove = triplet_loss(f.irrelevant, labels, margin=None, indices=pairs, reverse=True)
        loss = keep + 0.5 * remove + 0.1 * defend
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step:3}: L_K {keep.item():.3f}, L_NK {remove.item():.3f}, L_K* {defend.item():.3f}")
    with torch.no_grad():
        descriptors = model.eval()(images).relevant
    print(f"descriptors at test: {tuple(descriptors.shape)}")


if __name__ == "__main__":
    main()
