"""pytorch-metric-learning: subclasses of its classes, by their names, that take our operations where they say the same.

They keep the arguments, reducers, regularizers, statistics and results of their base classes. What our operations do
not say stays with the base class's own code, which each docstring names: distances other than `LpDistance` with p = 2
and power 1 or 2, `CosineSimilarity` and `DotProductSimilarity` of power 1; distances that collect statistics; labels
that are not whole numbers. Half precision is computed in float32 and rounded once.

On the CPU a batch with few pairs stays there, too, as PyTorch's matrix is the faster one: with 32 rows ours takes 1.2
(`CircleLoss`) to 1.8 times (`LpDistance`) as long, with 1,024 two thirds of the time to a fifth (one thread). From
`PAIRS_ON_CPU` pairs on, or `CIRCLE_PAIRS_ON_CPU`, our operations are taken.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning import distances, losses, miners
from pytorch_metric_learning.utils import accuracy_calculator
from torch import Tensor

from apd_kernels.contrastive import circle_loss
from apd_kernels.distance import pairwise_distance
from apd_kernels.evaluation.neighbors import knn
from apd_kernels.evaluation.ranking import PositiveRanks, positive_ranks
from apd_kernels.mining import batch_hard
from apd_kernels.paired import paired_distance

__all__ = [
    "KNN",
    "AccuracyCalculator",
    "BatchHardMiner",
    "CircleLoss",
    "CrossBatchMemory",
    "LpDistance",
    "TripletMarginLoss",
]

# Theirs in time over ours, forward and backward where there is one, 128 and 256 rows of 512: `LpDistance` 0.92 and
# 1.06, `BatchHardMiner` 0.90 and 1.25, `TripletMarginLoss` 0.92 and 1.56. `CircleLoss`, 64 and 128 rows: 0.99 and 1.23.
PAIRS_ON_CPU = 1 << 15
CIRCLE_PAIRS_ON_CPU = 1 << 13


def _are_few(x: Tensor, y: Tensor, enough: int) -> bool:
    return x.device.type == "cpu" and len(x) * len(y) < enough


class LpDistance(distances.LpDistance):
    """`LpDistance`, with `pairwise_distance` for p = 2 and `torch.cdist` for the others.

    Between near-duplicates its float32 is rounding below 1e-3 of the norms, as that of `torch.cdist` is.
    """

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor | None) -> Tensor:
        """Distances of all rows, (N, M), in the dtype of the rows."""
        y = query_emb if ref_emb is None else ref_emb
        if self.p != 2 or not query_emb.is_floating_point() or _are_few(query_emb, y, PAIRS_ON_CPU):
            return super().compute_mat(query_emb, ref_emb)
        return pairwise_distance(query_emb, None if y is query_emb else y).to(query_emb.dtype)


def _metric(distance: Any) -> str | None:
    """Our name of a distance, of rows that it has normalised where it does that; None for those without one."""
    if distance.collect_stats:
        return None
    if type(distance) in (distances.LpDistance, LpDistance) and distance.p == 2:
        return {1: "euclidean", 2: "sqeuclidean"}.get(distance.power)
    similarities = distances.CosineSimilarity, distances.DotProductSimilarity
    if type(distance) in similarities and distance.p == 2 and distance.power == 1:
        return "cosine" if distance.normalize_embeddings else "dot"
    return None


def _are_whole(*labels: Any) -> bool:
    return all(isinstance(of, Tensor) and not (of.is_floating_point() or of.is_complex()) for of in labels)


def _rows(distance: Any, metric: str, x: Tensor) -> Tensor:
    return x if metric == "cosine" else distance.maybe_normalize(x)


class BatchHardMiner(miners.BatchHardMiner):
    """`BatchHardMiner` by `batch_hard`, without a matrix; with `allowed_pos_range` or `allowed_neg_range` the base's.

    Of several at the same distance, the lowest index is mined.
    """

    def mine(self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor) -> tuple[Tensor, ...]:
        """Anchors that have both, their farthest positives and nearest negatives: three index tensors."""
        metric = _metric(self.distance)
        ranges = self.allowed_pos_range, self.allowed_neg_range
        few = _are_few(embeddings, ref_emb, PAIRS_ON_CPU)
        if few or metric is None or ranges != (None, None) or not _are_whole(labels, ref_labels):
            result: tuple[Tensor, ...] = super().mine(embeddings, labels, ref_emb, ref_labels)
            return result
        x = _rows(self.distance, metric, embeddings)
        # The base leaves out an anchor itself where the labels are one tensor.
        others = () if ref_labels is labels else (_rows(self.distance, metric, ref_emb), ref_labels)
        mined = batch_hard(x, labels, *others, metric=metric)
        anchors = mined.valid.nonzero()[:, 0]
        found = [of[anchors] for of in mined.distances]
        if self.distance.is_inverted:  # similarities
            found = [1 - of if metric == "cosine" else -of for of in found]
        self.set_stats(*found)
        return anchors, *(of[anchors] for of in mined.indices)


class _AllPairs(NamedTuple):
    """All pairs of a batch and a memory, but each row's with its own copy there."""

    own: Tensor | None


class CircleLoss(losses.CircleLoss):
    """`CircleLoss` by `circle_loss`, without a matrix; of given index tuples, the base's."""

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """The terms of the anchors, for the reducer."""
        own = None
        if isinstance(indices_tuple, _AllPairs):
            own, indices_tuple = indices_tuple.own, None
        known = _metric(self.distance) == "cosine" and indices_tuple is None and _are_whole(labels, ref_labels)
        # Of one pair of each kind the base's loss is 0; more than two pairs have two of a kind.
        few = len(embeddings) * len(ref_emb) <= 2 or _are_few(embeddings, ref_emb, CIRCLE_PAIRS_ON_CPU)
        if not known or (few and own is None):
            result: dict[str, Any] = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return result
        others = () if ref_labels is labels else (ref_emb, ref_labels)
        terms = circle_loss(embeddings, labels, *others, margin=self.m, gamma=self.gamma, own=own, reduction="none")
        indices = torch.arange(len(terms), device=terms.device)
        # A column, as the base class's: reducers that multiply by weights depend on it.
        column = terms.to(embeddings.dtype)[:, None]
        return {"loss": {"losses": column, "indices": indices, "reduction_type": "element"}}


class TripletMarginLoss(losses.TripletMarginLoss):
    """`TripletMarginLoss`: of triplets given by a miner, not more than anchors, by `paired_distance`, without a matrix.

    Of other triplets (all of the batch, random ones) the base's, which gathers from the matrix; with `swap`, too.
    """

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, Any]:
        """The terms of the triplets, for the reducer."""
        metric = _metric(self.distance)
        given = indices_tuple is not None and len(indices_tuple) == 3 and 0 < len(indices_tuple[0]) <= len(embeddings)
        if metric is None or not given or self.swap or _are_few(embeddings, ref_emb, PAIRS_ON_CPU):
            result: dict[str, Any] = super().compute_loss(embeddings, labels, indices_tuple, ref_emb, ref_labels)
            return result
        x = _rows(self.distance, metric, embeddings)
        y = x if ref_emb is embeddings else _rows(self.distance, metric, ref_emb)
        a, p, n = indices_tuple
        anchors = x[a]
        gap = paired_distance(anchors, y[p], metric=metric) - paired_distance(anchors, y[n], metric=metric)
        violation = gap.to(embeddings.dtype) + self.margin
        terms = torch.nn.functional.softplus(violation) if self.smooth_loss else violation.relu()
        return {"loss": {"losses": terms, "indices": indices_tuple, "reduction_type": "triplet"}}


class CrossBatchMemory(losses.CrossBatchMemory):
    """`CrossBatchMemory`, which lists no pairs for this module's `CircleLoss` without a miner; else the base's."""

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,
        L_mem: Tensor,
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """What the loss is to compare."""
        lists = self.miner or input_indices_tuple is not None or type(self.loss) is not CircleLoss
        few = _are_few(embeddings, E_mem, CIRCLE_PAIRS_ON_CPU)
        if lists or few or _metric(self.loss.distance) != "cosine" or not _are_whole(labels, L_mem):
            return super().create_indices_tuple(
                embeddings, labels, E_mem, L_mem, input_indices_tuple, do_remove_self_comparisons
            )
        return _AllPairs(self.curr_batch_idx if do_remove_self_comparisons else None)


class KNN:
    """A `knn_func` by `knn`: exact, with FAISS's results, in blocks.

    Args:
        metric: ``"sqeuclidean"``, as FAISS's flat index; or another of `knn`.
    """

    def __init__(self, metric: str = "sqeuclidean") -> None:
        self.metric = metric

    def __call__(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The k nearest rows of the reference.

        Args:
            query, reference: shapes (Q, D) and (G, D), floating; the queries themselves when None.
            k: how many.
            ref_includes_query: row i of the reference is query i, and is left out.

        Returns:
            ``(distances, indices)``, (Q, k) each; equal distances by lowest index.

        Raises:
            TypeError, ValueError: as `knn`.
        """
        reference = query if reference is None else reference
        own = torch.arange(len(query), device=query.device) if ref_includes_query else False
        found = knn(query, reference, k, metric=self.metric, exclude_self=own)
        return found.distances, found.indices


class AccuracyCalculator(accuracy_calculator.AccuracyCalculator):
    """`AccuracyCalculator` by `positive_ranks`: no lists of neighbours, so ``k=None`` needs no Q×G matrix.

    Figures that need clusters (AMI, NMI) and those that a subclass adds are computed by the base class, with `KNN`
    where they need neighbours; so is everything with a `knn_func` or `label_comparison_fn` of one's own, or labels that
    are not one whole number each. Where images of different identities are equally far, a negative comes first.
    """

    def __init__(self, *args: Any, knn_func: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, knn_func=KNN() if knn_func is None else knn_func, **kwargs)

    def get_accuracy(
        self,
        query: Any,
        query_labels: Any,
        reference: Any = None,
        reference_labels: Any = None,
        ref_includes_query: bool = False,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> dict[str, Any]:
        """The figures by name.

        Args:
            query, reference: features, shapes (Q, D) and (G, D), tensors or arrays; the queries themselves when None,
                each without itself.
            query_labels, reference_labels: identities, shapes (Q,) and (G,).
            ref_includes_query: the first Q rows of the reference are the queries.
            include, exclude: names of figures, a tuple each.

        Raises:
            ValueError: lengths that differ, or a reference that does not begin with the queries, as the base class;
                features that are not finite.
        """
        given = query, query_labels, reference, reference_labels, ref_includes_query
        if reference is None:
            reference, reference_labels, ref_includes_query = query, query_labels, True
        x, y = (torch.as_tensor(of).to(self.device, torch.float) for of in (query, reference))
        ids, y_ids = (torch.as_tensor(of).to(self.device) for of in (query_labels, reference_labels))
        wanted = self.get_function_dict(include, exclude)
        ours = [name for name in wanted if name in _FIGURES and _is_of_the_base(self, name)]
        plain = type(self.knn_func) is KNN and self.label_comparison_fn is accuracy_calculator.EQUALITY
        whole = _are_whole(ids, y_ids) and ids.dim() == y_ids.dim() == 1
        if not (ours and plain and whole and len(x) and self.knn_func.metric == "sqeuclidean"):
            result: dict[str, Any] = super().get_accuracy(*given, include, exclude)
            return result
        if len(x) != len(ids) or len(y) != len(y_ids):
            raise ValueError("embeddings and labels must have the same length")
        own = torch.arange(len(x), device=x.device) if ref_includes_query else None
        if own is not None and not (torch.allclose(x, y[: len(x)]) and torch.equal(ids, y_ids[: len(x)])):
            raise ValueError("ref_includes_query: expected a reference that begins with the queries and their labels")

        self.curr_function_dict = wanted
        in_reference, counts = y_ids.unique(return_counts=True)
        counts = counts[torch.isin(in_reference, ids)]
        k = self.determine_k(counts if len(counts) else counts.new_zeros(1), len(y), ref_includes_query)
        figures: dict[str, Any] = {}
        try:
            ranks = positive_ranks(x, y, ids, y_ids, metric="sqeuclidean", exclude=own, junk=None)
        except ValueError:
            if _has_answer(ids, y_ids, ref_includes_query):
                raise
            accuracy_calculator.c_f.LOGGER.warning("None of the query labels are in the reference set.")
            figures = {name: accuracy_calculator.nan_accuracy(ids.unique(), self.return_per_class) for name in ours}
        else:
            valid = ranks.positives > 0
            for name in ours:
                values = _FIGURES[name](ranks, k)[valid]
                labels = ids[valid][:, None]
                figures[name] = accuracy_calculator.maybe_get_avg_of_avgs(
                    values, labels, self.avg_of_avgs, self.return_per_class
                )
        others = tuple(name for name in wanted if name not in ours)
        if others:
            figures |= super().get_accuracy(*given, include=others)
            self.curr_function_dict = wanted
        return {name: figures[name] for name in wanted}


def _is_of_the_base(calculator: AccuracyCalculator, name: str) -> bool:
    base = accuracy_calculator.AccuracyCalculator
    return getattr(type(calculator), f"calculate_{name}") is getattr(base, f"calculate_{name}")


def _has_answer(ids: Tensor, y_ids: Tensor, ref_includes_query: bool) -> bool:
    in_reference, counts = y_ids.unique(return_counts=True)
    return bool(torch.isin(ids, in_reference[counts > int(ref_includes_query)]).any())


def _average_precision(ranks: PositiveRanks, k: int) -> Tensor:
    """It looks at no more than k neighbours, and divides by all positives."""
    precision = torch.where(ranks.rank <= k, ranks.hit / ranks.rank.double(), 0)
    return torch.bincount(ranks.query, weights=precision, minlength=len(ranks.positives)) / ranks.positives


def _r_precision(ranks: PositiveRanks, k: int) -> Tensor:
    """Of no more than k neighbours."""
    places = ranks.positives.clamp(max=k)
    within = (ranks.rank <= places[ranks.query]).double()
    return torch.bincount(ranks.query, weights=within, minlength=len(places)) / places


def _average_precision_at_r(ranks: PositiveRanks, k: int) -> Tensor:
    within = ranks.rank <= ranks.positives.clamp(max=k)[ranks.query]
    precision = torch.where(within, ranks.hit / ranks.rank.double(), 0)
    return torch.bincount(ranks.query, weights=precision, minlength=len(ranks.positives)) / ranks.positives


_FIGURES = {
    "mean_average_precision": _average_precision,
    "mean_average_precision_at_r": _average_precision_at_r,
    "mean_reciprocal_rank": lambda ranks, k: ranks.reciprocal_rank(k),
    "precision_at_1": lambda ranks, k: ranks.reciprocal_rank(1),
    "r_precision": _r_precision,
}
