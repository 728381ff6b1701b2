"""The training operations as modules that hold their configuration and nothing else; the memories, which are state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from apd_kernels._core.operands import PreparedRows
from apd_kernels.adversarial import metric_perturb
from apd_kernels.contrastive import circle_loss, supervised_contrastive_loss
from apd_kernels.losses import triplet_loss
from apd_kernels.memory import ClusterMemory, CrossBatchMemory
from apd_kernels.perturbation_loss import metric_perturbation_loss
from apd_kernels.ssd import DisentangledMaps, identity_derangement, ssd_mask

__all__ = [
    "CircleLoss",
    "ClusterMemory",
    "CrossBatchMemory",
    "MetricPerturb",
    "MetricPerturbationLoss",
    "SSDMask",
    "SupervisedContrastiveLoss",
    "TripletLoss",
]


class _Configured(Module):
    """A module whose configuration is what its constructor was given, and is what `repr` shows."""

    def __init__(self, **configuration: object) -> None:
        super().__init__()
        self._names = tuple(configuration)
        for name, value in configuration.items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self._names)


class TripletLoss(_Configured):
    """Triplet loss on mined pairs, see `triplet_loss`.

    Args:
        margin: hinge margin, at least 0; None for the soft margin.
        metric: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        reverse: whether the term removes identity instead (APD, L_NK).
        mining: ``"hard"`` or ``"weighted"``.
        reduction: ``"mean"``, ``"mean_all"``, ``"sum"`` or ``"none"``.

    >>> import torch
    >>> from apd_kernels import nn
    >>> criterion = nn.TripletLoss(margin=0.3)
    >>> criterion
    TripletLoss(margin=0.3, metric='euclidean', reverse=False, mining='hard', reduction='mean')
    >>> criterion(torch.tensor([[0.0], [1.0], [1.5], [9.0]]), torch.tensor([7, 7, 8, 8]))
    tensor(2.0250)
    """

    margin: float | None
    metric: str
    reverse: bool
    mining: str
    reduction: str

    def __init__(
        self,
        margin: float | None = 0.3,
        metric: str = "euclidean",
        reverse: bool = False,
        mining: str = "hard",
        reduction: str = "mean",
    ) -> None:
        super().__init__(margin=margin, metric=metric, reverse=reverse, mining=mining, reduction=reduction)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        y: Tensor | PreparedRows | None = None,
        y_labels: Tensor | None = None,
        *,
        indices: tuple[Tensor, Tensor] | None = None,
        **pairing: Any,
    ) -> Tensor:
        """The loss of (N, D) or (S, N, D), also against a memory `y` or on given winners; ``own`` to ``negatives`` as
        in `triplet_loss`."""
        return triplet_loss(
            x,
            labels,
            y,
            y_labels,
            margin=self.margin,
            metric=self.metric,
            reverse=self.reverse,
            mining=self.mining,
            reduction=self.reduction,
            indices=indices,
            **pairing,
        )


class CircleLoss(_Configured):
    """Circle loss, see `circle_loss`.

    Args:
        margin, gamma, reduction: as in `circle_loss`.

    >>> import torch
    >>> from apd_kernels import nn
    >>> criterion = nn.CircleLoss(gamma=32.0)
    >>> criterion
    CircleLoss(margin=0.25, gamma=32.0, reduction='mean')
    >>> criterion(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]]), torch.tensor([7, 7, 8, 8]))
    tensor(3.3074)
    """

    margin: float
    gamma: float
    reduction: str

    def __init__(self, margin: float = 0.25, gamma: float = 128.0, reduction: str = "mean") -> None:
        super().__init__(margin=margin, gamma=gamma, reduction=reduction)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        y: Tensor | PreparedRows | None = None,
        y_labels: Tensor | None = None,
        **pairing: Any,
    ) -> Tensor:
        """The loss of (N, D) or (S, N, D), also against a memory `y`; ``own`` to ``negatives`` as in `circle_loss`."""
        return circle_loss(
            x, labels, y, y_labels, margin=self.margin, gamma=self.gamma, reduction=self.reduction, **pairing
        )


class SupervisedContrastiveLoss(_Configured):
    """Supervised contrastive loss, see `supervised_contrastive_loss`.

    Args:
        temperature, metric, reduction: as in `supervised_contrastive_loss`.

    >>> import torch
    >>> from apd_kernels import nn
    >>> criterion = nn.SupervisedContrastiveLoss(0.5)
    >>> criterion
    SupervisedContrastiveLoss(temperature=0.5, metric='cosine', reduction='mean')
    >>> criterion(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.5, 1.0]]), torch.tensor([7, 7, 8, 8]))
    tensor(0.4471)
    """

    temperature: float
    metric: str
    reduction: str

    def __init__(self, temperature: float = 0.1, metric: str = "cosine", reduction: str = "mean") -> None:
        super().__init__(temperature=temperature, metric=metric, reduction=reduction)

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        y: Tensor | PreparedRows | None = None,
        y_labels: Tensor | None = None,
        **pairing: Any,
    ) -> Tensor:
        """The loss of (N, D) or (S, N, D), also against a memory `y`, and which pairs count as in `batch_hard`."""
        return supervised_contrastive_loss(
            x,
            labels,
            y,
            y_labels,
            temperature=self.temperature,
            metric=self.metric,
            reduction=self.reduction,
            **pairing,
        )


class MetricPerturbationLoss(_Configured):
    """APD's eq. 3, see `metric_perturbation_loss`; it has no configuration.

    >>> import torch
    >>> from apd_kernels import nn
    >>> criterion = nn.MetricPerturbationLoss()
    >>> x = torch.tensor([[0.0, 0.0]])
    >>> criterion(x, torch.tensor([[3.0, 4.0]]), x)
    tensor(5.0067)
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(
        self, perturbed: Tensor, negatives: Tensor, original: Tensor, *, indices: Tensor | None = None
    ) -> Tensor:
        """The loss of (N, D) samples with negatives (N, D), (N, M, D) or, with `indices`, rows of a bank (K, D)."""
        return metric_perturbation_loss(perturbed, negatives, original, indices=indices)


class MetricPerturb(_Configured):
    """Features moved inside a ball so that they match badly, see `metric_perturb`; the same in training and evaluation.

    Args:
        epsilon, epsilon_mode, steps, step_size, norm, objective, random_start: as in `metric_perturb`.

    >>> import torch
    >>> from apd_kernels import nn
    >>> perturb = nn.MetricPerturb(0.5, steps=5)
    >>> perturb
    MetricPerturb(epsilon=0.5, epsilon_mode='absolute', steps=5, step_size=None, norm='l2', objective='triplet',
    random_start=False)
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [1.0, 3.0]])
    >>> (perturb(x, torch.tensor([0, 0, 1, 1])) - x).norm(dim=1)
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """

    epsilon: float
    epsilon_mode: str
    steps: int
    step_size: float | None
    norm: str
    objective: str
    random_start: bool

    def __init__(
        self,
        epsilon: float,
        *,
        epsilon_mode: str = "absolute",
        steps: int = 1,
        step_size: float | None = None,
        norm: str = "l2",
        objective: str = "triplet",
        random_start: bool = False,
    ) -> None:
        super().__init__(
            epsilon=epsilon,
            epsilon_mode=epsilon_mode,
            steps=steps,
            step_size=step_size,
            norm=norm,
            objective=objective,
            random_start=random_start,
        )

    def forward(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        negatives: Tensor | None = None,
        memory: Tensor | None = None,
        memory_labels: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Perturbed features, of the shape and dtype of `x`; the arguments as in `metric_perturb`."""
        return metric_perturb(
            x,
            labels,
            epsilon=self.epsilon,
            epsilon_mode=self.epsilon_mode,
            steps=self.steps,
            step_size=self.step_size,
            norm=self.norm,
            objective=self.objective,
            negatives=negatives,
            memory=memory,
            memory_labels=memory_labels,
            random_start=self.random_start,
            noise=noise,
            generator=generator,
        )


class SSDMask(_Configured):
    """APD's SSD step, see `ssd_mask`. In training it draws the permutation between identities itself.

    Args:
        stacked: return the maps as one batch for one pass of a shared network.

    >>> import torch
    >>> from apd_kernels import nn
    >>> mask = nn.SSDMask()
    >>> features, labels = torch.ones(4, 1, 1), torch.tensor([3, 3, 5, 5])
    >>> mask(features, [torch.zeros(4, 1, 1)], labels).perturbed.flatten()
    tensor([1., 1., 1., 1.])
    >>> mask.eval()(features, [torch.zeros(4, 1, 1)], labels).perturbed is None
    True
    """

    stacked: bool

    def __init__(self, *, stacked: bool = False) -> None:
        super().__init__(stacked=stacked)

    def forward(
        self,
        features: Tensor,
        logits: Sequence[Tensor],
        labels: Tensor | None = None,
        *,
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> DisentangledMaps | Tensor:
        """K, NK and K*.

        Args:
            features, logits: as in `ssd_mask`.
            labels: identity of each image, (B,), any integer dtype: in training the permutation is drawn by
                `identity_derangement`, in evaluation they are not looked at, and there is no K*. None: no K*.
            permutation: one to take instead, in training and evaluation, int64 (B,). To know which images could not
                get another identity, draw it with ``identity_derangement(labels, return_valid=True)``.
            generator: of the draw.

        Raises:
            TypeError, ValueError: as `ssd_mask` and `identity_derangement`; labels and a permutation, both.
        """
        if permutation is not None and labels is not None:
            raise ValueError("permutation: expected None with labels, from which it is drawn, got a tensor")
        if self.training and labels is not None:
            permutation = identity_derangement(labels, generator)
        return ssd_mask(features, logits, permutation, stacked=self.stacked)
