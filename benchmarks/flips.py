"""How many anchors `metric_perturb` flips, by the radius of its ball: ``python -m benchmarks.flips FEATURES.npz``.

Of the queries whose nearest other query has their identity, the share for which it no longer has, beside random moves
of the same length.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from apd.retrieval.features import load_features
from apd_kernels import metric_perturb

EPSILONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2)
STEPS = 10


def own_identity_nearest(x: Tensor, labels: Tensor) -> Tensor:
    return labels[torch.cdist(x, x).fill_diagonal_(torch.inf).argmin(1)] == labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("features", type=Path, help="feature file with a split array, as apd evaluate takes it")
    parser.add_argument("--output", type=Path, default=Path("flips.png"), help="the plot")
    arguments = parser.parse_args()
    queries = load_features(arguments.features).part("query")
    x = torch.from_numpy(queries.features).float()
    labels = torch.from_numpy(queries.identities()).long()
    before = own_identity_nearest(x, labels)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    direction *= x.norm(dim=1, keepdim=True) / direction.norm(dim=1, keepdim=True)

    def lost(moved: Tensor) -> float:
        return 100 * (before & ~own_identity_nearest(moved, labels)).sum().item() / before.sum().item()

    adversarial, random = [], []
    for epsilon in EPSILONS:
        adversarial.append(lost(metric_perturb(x, labels, epsilon=epsilon, epsilon_mode="relative", steps=STEPS)))
        random.append(lost(x + epsilon * direction))
        print(f"epsilon {epsilon:.2f}: {adversarial[-1]:.1f}%, random direction {random[-1]:.1f}%")

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    axes.plot(EPSILONS, adversarial, "o-", label=f"metric_perturb, {STEPS} L2 steps")
    axes.plot(EPSILONS, random, "x:", label="random direction")
    axes.set(xlabel="ε: radius as a share of each feature's norm", ylabel="right nearest neighbours lost, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(arguments.output, dpi=120)
    print(f"wrote {arguments.output}: {int(before.sum())} of {len(x)} queries have a right nearest neighbour at first")


if __name__ == "__main__":
    main()
