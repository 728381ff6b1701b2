"""SP-Net's losses: L_SP = w_K L_K + ramp · (w_NK L_NK + w_K* L_K*) (APD, section SP-Net).

For an anchor a, a positive p and a negative n, with d the Euclidean distance and SP(x) = ln(1 + e^x):

    L_K  = SP( d(f_a, f_p) − d(f_a, f_n) ) + CE(f_a, y_a)                 identity stays
    L_K* = the same on f*                                                 whatever it is mixed with
    L_NK = SP( d(f_n,a, f_n,n) − d(f_n,a, f_n,p) ) + CE(f_n,a, y_n)       what is left out must not carry identity

The triplets are mined once, batch-hard on f, and serve all three losses (``triplets: shared``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from apd.config.values import LatentConfig, LossConfig
from apd.models.spnet import RELEVANT, Branches, Heads
from apd_kernels import Pair, batch_hard, metric_perturb, pairwise_distance, triplet_loss

_IGNORED = -100  # cross_entropy's ignore_index


def spnet_losses(branches: Branches, labels: Tensor, config: LossConfig, ramp: float) -> dict[str, Tensor]:
    """The losses of a training pass, by the names of their columns; ``"loss"`` is the weighted sum.

    Args:
        branches: of `SPNet.branches`.
        labels: identity of each image, int64 (B,).
        config: weights, margin, and where triplets come from.
        ramp: factor in [0, 1] on the weights of L_NK and L_K*.
    """
    relevant, irrelevant, perturbed, exchanged = branches
    triplet, pairs = triplet_loss(relevant.features, labels, margin=config.margin, return_indices=True)
    losses = {"loss_k": triplet + _identity(relevant.logits, labels, config)}
    loss = config.weight_k * losses["loss_k"]
    if irrelevant is not None:
        chosen = _irrelevant_pairs(irrelevant.features.detach(), labels, pairs, config.triplets)
        negative = chosen.negative
        wrong = torch.where(negative < 0, _IGNORED, labels[negative.clamp(min=0)])
        losses["loss_nk"] = _triplet(irrelevant.features, labels, chosen, config, reverse=True) + _identity(
            irrelevant.logits, wrong, config
        )
        loss = loss + ramp * config.weight_nk * losses["loss_nk"]
    if perturbed is not None:
        assert exchanged is not None
        mined = pairs if config.triplets == "shared" else batch_hard(perturbed.features.detach(), labels).indices
        # An image that could not get another identity's NK is no K*: it takes no part as an anchor.
        anchors = Pair(*(torch.where(exchanged, index, -1) for index in mined))
        losses["loss_kp"] = _triplet(perturbed.features, labels, anchors, config) + _identity(
            perturbed.logits, torch.where(exchanged, labels, _IGNORED), config
        )
        loss = loss + ramp * config.weight_kp * losses["loss_kp"]
    return {"loss": loss, **losses}


def latent_loss(features: Tensor, labels: Tensor, heads: Heads, losses: LossConfig, config: LatentConfig) -> Tensor:
    """Triplet and cross-entropy on features moved so that they match badly: hard samples without a generator.

    Args:
        features: f, (B, D).
        labels: identity of each, int64 (B,).
        heads: those of f; their running statistics do not see the moved features.
        losses: margin and label smoothing.
        config: how far to move, and in which direction.
    """
    if config.direction == "random":
        moved = randomly_moved(features, config.epsilon)
    else:
        moved = metric_perturb(features, labels, epsilon=config.epsilon, epsilon_mode="relative", steps=config.steps)
    logits = heads(moved, RELEVANT, track=False)
    return triplet_loss(moved, labels, margin=losses.margin) + _identity(logits, labels, losses)


def randomly_moved(features: Tensor, epsilon: float) -> Tensor:
    """Features (B, D), each moved in a direction drawn uniformly by `epsilon` times its norm; gradients pass through.

    The control for `metric_perturb`: the same ball, all of its radius, and nothing known about identities.
    """
    with torch.no_grad():
        x = features.float()
        noise = torch.randn_like(x)
        change = noise * (epsilon * x.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True))
    return features + change.to(features.dtype)


def _triplet(x: Tensor, labels: Tensor, pairs: Pair, config: LossConfig, *, reverse: bool = False) -> Tensor:
    return triplet_loss(x, labels, margin=config.margin, indices=pairs, reverse=reverse)


def _identity(logits: Tensor, labels: Tensor, config: LossConfig) -> Tensor:
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32))  # at least
    return cross_entropy(precise, labels, label_smoothing=config.label_smoothing, ignore_index=_IGNORED)


def _irrelevant_pairs(x: Tensor, labels: Tensor, shared: Pair, triplets: str) -> Pair:
    """The triplets of L_NK. ``reversed``: the nearest same and the farthest other identity, the hardest to exchange."""
    if triplets == "shared":
        return shared
    if triplets == "own":
        return batch_hard(x, labels).indices
    distances = pairwise_distance(x)
    same = labels[:, None] == labels
    others = same & ~torch.eye(len(labels), dtype=torch.bool, device=x.device)
    positive = distances.masked_fill(~others, torch.inf).min(1)
    negative = distances.masked_fill(same, -torch.inf).max(1)
    return Pair(
        torch.where(positive.values == torch.inf, -1, positive.indices),
        torch.where(negative.values == -torch.inf, -1, negative.indices),
    )
