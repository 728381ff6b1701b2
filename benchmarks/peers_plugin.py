"""A plugin of pytest: pytorch-metric-learning's classes are ours, before its tests import them."""

from __future__ import annotations

from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils import accuracy_calculator

from apd_kernels.drop_in import pytorch_metric_learning as ours

ours.PAIRS_ON_CPU = ours.CIRCLE_PAIRS_ON_CPU = 0  # its tests are small
for module, names in (
    (distances, ("LpDistance",)),
    (miners, ("BatchHardMiner",)),
    (losses, ("CircleLoss", "CrossBatchMemory", "TripletMarginLoss")),
    (accuracy_calculator, ("AccuracyCalculator",)),
):
    for name in names:
        setattr(module, name, getattr(ours, name))
