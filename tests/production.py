"""The launches whose machine code is checked: each operation at the sizes that it is used at, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import example_losses
import torch

from apd_kernels import reducers
from apd_kernels._core.operands import Operands
from apd_kernels._core.pairing import Pairing
from apd_kernels._core.reducer import PairReducer
from apd_kernels.kernels import (
    adversarial,
    contrastive,
    distance,
    losses,
    memory,
    mining,
    neighbors,
    pairs,
    prepared,
    ranking,
    ssd,
    weighting,
)
from apd_kernels.kernels import paired as paired_distance
from apd_kernels.kernels import perturbation_loss as perturbation_kernels

CASES: list[Callable[[], None]] = []

OVER_SIZES: list[Callable[[], None]] = []
"""Operations at every batch size from 1 to 300."""

MATRIX_KERNELS = {
    "_add_to_anchors",
    "_add_to_others",
    "_collect",
    "_contrast",
    "_contrast_weights",
    "_count_negatives",
    "_distance",
    "_gradient",
    "_group_maxima",
    "_mine",
    "_mine_triangle",
    "_prepared_distance",
    "_prepared_gradient",
    "_same_identity",
    "_weigh",
    "_weigh_weights",
    "lifted",
    "lifted_weights",
}
"""Kernels built on a matrix product: they must use the tensor cores."""


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES.append(function)
    return function


def over_sizes(function: Callable[[], None]) -> Callable[[], None]:
    OVER_SIZES.append(function)
    return function


def _rows(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _indices(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device="meta")


@case
def distance_fp32() -> None:
    for metric in ("euclidean", "dot"):
        distance.pairwise_distance(_rows(256, 2048), _rows(512, 2048), Operands(), metric, "fp32")
    distance.pairwise_distance(_rows(256, 2048), None, Operands(), "cosine", "fp32")


@case
def distance_tf32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), None, Operands(), "euclidean", "tf32")


@case
def distance_half() -> None:
    distance.pairwise_distance(_rows(4096, 2048, dtype=torch.float16), None, Operands(), "euclidean", "fp32")


@case
def distance_bf16_of_fp32() -> None:
    distance.pairwise_distance(_rows(4096, 2048), None, Operands(), "euclidean", "bf16")


@case
def distance_gradient() -> None:
    x, y, g = _rows(256, 2048), _rows(512, 2048), _rows(256, 512)
    distance.pairwise_distance_backward(g, g, x, y, "euclidean", "fp32", True, True)
    distance.pairwise_distance_backward(_rows(256, 256), _rows(256, 256), x, None, "dot", "fp32", True, False)


def _distance_split(*metrics: str) -> None:
    for metric in metrics:
        distance.pairwise_distance(_rows(4096, 2048), _rows(8192, 2048), Operands(), metric, "fp32")
        distance.pairwise_distance(_rows(4096, 2048), None, Operands(), metric, "fp32")


@case
def distance_split() -> None:
    _distance_split("euclidean", "dot")


@case
def distance_split_of_other_metrics() -> None:
    """A root less than "euclidean", and a division by norms more than "dot"."""
    _distance_split("sqeuclidean", "cosine")


@case
def distance_split_gradient() -> None:
    x, y, g = _rows(4096, 2048), _rows(8192, 2048), _rows(4096, 8192)
    for metric in ("euclidean", "dot"):
        distance.pairwise_distance_backward(g, g, x, y, metric, "fp32", True, True)
        distance.pairwise_distance_backward(_rows(8192, 8192), _rows(8192, 8192), y, None, metric, "fp32", True, False)


@case
def distance_of_prepared() -> None:
    for dtype, precision in ((torch.float32, "tf32"), (torch.float32, "bf16"), (torch.bfloat16, "fp32")):
        x, y = _rows(256, 2048, dtype=dtype), _rows(65536, 2048, dtype=dtype)
        for metric in ("euclidean", "dot"):
            kept = prepared.prepare_rows(y, metric == "euclidean", precision)
            distance.pairwise_distance(x, y, kept, metric, precision)


@case
def paired() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, row = _rows(65536, 2048, dtype=dtype), _rows(65536)
        for metric in ("euclidean", "cosine"):
            paired_distance.paired_distance(x, x, metric)
            paired_distance.paired_distance_backward(row, row, x, x, metric, True, True)


@over_sizes
def paired_over_sizes() -> None:
    for n in range(1, 301):
        x, row = _rows(n, 2048), _rows(n)
        paired_distance.paired_distance(x, x, "euclidean")
        paired_distance.paired_distance_backward(row, row, x, x, "euclidean", True, True)


@case
def triplet_batch() -> None:
    losses.triplet_loss(_rows(64, 2048), None, Operands(), Pairing(_indices(64)), 0.3, False, "euclidean", "fp32")


@case
def triplet_of_given_pairs() -> None:
    losses.triplet_loss_indexed(_rows(64, 2048), _rows(256, 2048), _indices(64), _indices(64), 0.3, False, "cosine")


@case
def triplet_sets_half() -> None:
    x = _rows(5, 64, 768, dtype=torch.bfloat16)
    losses.triplet_loss(x, None, Operands(), Pairing(_indices(64)), None, True, "sqeuclidean", "fp32")


@case
def mining_in_memory() -> None:
    x, y = _rows(256, 2048), _rows(65536, 2048)
    mining.batch_hard(x, y, Operands(), Pairing(_indices(256), _indices(65536)), "cosine", "tf32")
    valid = torch.empty(65536, dtype=torch.bool, device="meta")
    rows, columns = _indices(256), _indices(65536)
    pairing = Pairing(rows, columns, rows, rows, columns, valid, "within", "across")
    mining.batch_hard(x, y, Operands(), pairing, "euclidean", "fp32")


@case
def mining_of_kept_rows() -> None:
    kept = torch.empty(65536, 2048, device="meta")
    for metric, dtype, precision in (
        ("cosine", torch.float32, "fp32"),
        ("euclidean", torch.float32, "tf32"),
        ("euclidean", torch.float32, "bf16"),
        ("euclidean", torch.float16, "fp32"),
    ):
        x, y, euclidean = _rows(256, 2048, dtype=dtype), kept.to(dtype), metric == "euclidean"
        operands = prepared.prepare_rows(y, euclidean, precision)
        mining.batch_hard(x, y, operands, Pairing(_indices(256), _indices(65536)), metric, precision)


@case
def large_problems_of_rows() -> None:
    for dtype, precision in ((torch.float32, "tf32"), (torch.float32, "bf16"), (torch.float16, "fp32")):
        x, y = _rows(512, 2048, dtype=dtype), _rows(65536, 2048, dtype=dtype)
        valid = torch.empty(65536, dtype=torch.bool, device="meta")
        distance.pairwise_distance(x, y, Operands(), "euclidean", precision)
        for own, y_valid in ((None, None), (_indices(512), valid)):
            pairing = Pairing(_indices(512), _indices(65536), own=own, y_valid=y_valid)
            mining.batch_hard(x, y, Operands(), pairing, "euclidean", precision)


@case
def split_dot_products() -> None:
    x, y = _rows(4096, 2048), _rows(8192, 2048)
    distance.pairwise_distance(x, y, Operands(), "dot", "fp32")
    mining.batch_hard(x, y, Operands(), Pairing(_indices(4096), _indices(8192)), "dot", "fp32")


@case
def mining_in_large_batch() -> None:
    for precision in ("fp32", "tf32"):
        mining.batch_hard(_rows(4096, 2048), None, Operands(), Pairing(_indices(4096)), "euclidean", precision)
    labels = _indices(4096)
    pairing = Pairing(labels, domains=labels, positives="across", negatives="within")
    mining.batch_hard(_rows(4096, 2048), None, Operands(), pairing, "euclidean", "fp32")


@case
def pair_gradient() -> None:
    x, y, w, i = _rows(256, 2048), _rows(4096, 2048), _rows(256), _indices(256)
    mining.pair_gradient(x, None, w, w, i, i, _rows(1), "euclidean", True, False)
    mining.pair_gradient(x, y, w, w, i, i, None, "dot", True, True)


@case
def pair_gradient_by_sorting() -> None:
    x, w, i = _rows(4096, 2048), _rows(4096), _indices(4096)
    mining.pair_gradient(x, None, w, w, i, i, _rows(1), "euclidean", True, False)
    mining.pair_gradient(x, _rows(8192, 2048), w, w, i, i, None, "dot", True, True)


def _ruled(n: int, m: int) -> Pairing:
    """A pairing that uses every argument."""
    valid = torch.empty(m, dtype=torch.bool, device="meta")
    return Pairing(_indices(n), _indices(m), _indices(n), _indices(n), _indices(m), valid, "within", "across")


def _contrastive(
    x: torch.Tensor, y: torch.Tensor | None, pairing: Pairing, precision: str = "fp32", needs_y: bool = False
) -> None:
    """Both losses with their gradients."""
    for form, scale in (("circle", 128.0), ("contrastive", 10.0)):
        choices = form, scale, 0.25, precision, True, needs_y
        loss, share, *sides = contrastive.contrastive_loss(x, y, Operands(), pairing, *choices)
        contrastive.contrastive_loss_scaled(loss, share, *sides)


@case
def contrastive_losses() -> None:
    _contrastive(_rows(4096, 2048), None, Pairing(_indices(4096)))
    _contrastive(_rows(256, 2048), _rows(65536, 2048), Pairing(_indices(256), _indices(65536)), needs_y=True)


@case
def contrastive_losses_of_ruled_pairs() -> None:
    _contrastive(_rows(256, 2048), _rows(8192, 2048), _ruled(256, 8192), needs_y=True)


@case
def contrastive_losses_tensor_cores() -> None:
    for precision in ("tf32", "bf16"):
        _contrastive(_rows(256, 2048), _rows(8192, 2048), _ruled(256, 8192), precision)


@case
def contrastive_losses_half() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x, y = _rows(5, 256, 768, dtype=dtype), _rows(5, 8192, 768, dtype=dtype)
        _contrastive(x, y, _ruled(256, 8192))


def _weighted(x: torch.Tensor, y: torch.Tensor | None, pairing: Pairing, metric: str, precision: str = "fp32") -> None:
    choices = Operands(), pairing, metric, precision
    found = weighting.weighted_pairs(x, y, *choices)
    weighting.weighted_pairs_backward(*found[:2], *found, x, y, *choices, True, y is not None)


def _pairs_of_losses(x: torch.Tensor, y: torch.Tensor | None, pairing: Pairing, precision: str = "fp32") -> None:
    """The reducers of the examples."""
    losses_of_pairs = example_losses.load()
    _reduced_pairs(x, y, pairing, precision, (
        (losses_of_pairs.LIFTED, 0, [1.0]),
        (losses_of_pairs.SIMILAR, 2, [2.0, 50.0, 0.5, 0.1]),
        (losses_of_pairs.RANKS, 1, [0.01]),
    ))  # fmt: skip


def _reduced_pairs(
    x: torch.Tensor,
    y: torch.Tensor | None,
    pairing: Pairing,
    precision: str,
    of_losses: tuple[tuple[PairReducer, int, list[float]], ...],
) -> None:
    """Each with its number of values and its parameters."""
    for reducer, values, parameters in of_losses:
        rows = x.shape[:-1]
        choices = Operands(), pairing, _rows(values, *rows), parameters, reducer.key, "euclidean", precision
        results = pairs.pair_reduce(x, y, *choices)
        pairs.pair_reduce_backward(results, results, x, y, *choices, True, y is not None)


@case
def pair_reduce() -> None:
    _pairs_of_losses(_rows(4096, 2048), None, Pairing(_indices(4096)))
    _pairs_of_losses(_rows(256, 2048), _rows(8192, 2048), _ruled(256, 8192), "tf32")


@case
def contrastive_terms() -> None:
    """The losses by anchor."""
    both = (reducers.CIRCLE, 0, [128.0, 0.25]), (reducers.CONTRASTIVE, 0, [10.0, 1.0])
    _reduced_pairs(_rows(4096, 2048), None, Pairing(_indices(4096)), "fp32", both)


@over_sizes
def pair_reduce_over_sizes() -> None:
    for n in range(1, 301):
        _pairs_of_losses(_rows(n, 2048), None, Pairing(_indices(n)))


@case
def weighted_pairs() -> None:
    _weighted(_rows(4096, 2048), None, Pairing(_indices(4096)), "euclidean")
    _weighted(_rows(256, 2048), _rows(8192, 2048), _ruled(256, 8192), "euclidean")
    _weighted(_rows(64, 2048), None, Pairing(_indices(64)), "dot")


@case
def weighted_pairs_tensor_cores() -> None:
    for precision in ("tf32", "bf16"):
        _weighted(_rows(256, 2048), _rows(8192, 2048), _ruled(256, 8192), "sqeuclidean", precision)
    for dtype in (torch.float16, torch.bfloat16):
        x, y = _rows(5, 256, 768, dtype=dtype), _rows(5, 8192, 768, dtype=dtype)
        _weighted(x, y, _ruled(256, 8192), "euclidean")


def _perturbation(n: int, negatives: torch.Tensor, indices: torch.Tensor | None) -> None:
    """The gradient of `perturbed` from the forward pass, and those of all inputs from the backward pass."""
    x, one = _rows(n, negatives.shape[-1], dtype=negatives.dtype), _rows(1)
    *_, to_negatives, to_original, total = perturbation_kernels.metric_perturbation_loss(x, negatives, x, indices, True)
    perturbation_kernels.metric_perturbation_loss_scaled(one, one, total)
    perturbation_kernels.metric_perturbation_loss_backward(
        one, one, x, negatives, x, indices, to_negatives, to_original, indices is None
    )


@case
def perturbation_loss() -> None:
    _perturbation(64, _rows(64, 4, 2048), None)
    _perturbation(64, _rows(64, 4, 2048, dtype=torch.float16).transpose(0, 1).contiguous().transpose(0, 1), None)


@case
def perturbation_loss_in_bank() -> None:
    _perturbation(256, _rows(65536, 768, dtype=torch.bfloat16), _indices(256, 4))
    _perturbation(64, _rows(4096, 8192), _indices(64, 4))


@case
def perturbation_loss_of_long_rows() -> None:
    _perturbation(64, _rows(64, 4, 12288), None)


@case
def metric_perturb_solver() -> None:
    for n in (16, 64):
        x = _rows(n, 2048)
        adversarial.metric_perturb(x, _indices(n), None, None, None, 0.1, 0.025, 10, True, "l2", "fp32")


@case
def metric_perturb_solver_of_several_programs() -> None:
    for n in (100, 256, 512):
        adversarial.metric_perturb(_rows(n, 2048), _indices(n), None, None, None, 0.1, 0.025, 2, True, "l2", "fp32")


@case
def metric_perturb_steps() -> None:
    x, memory = _rows(4096, 2048), _rows(65536, 2048)
    adversarial.metric_perturb(x, _indices(4096), None, None, None, 0.1, 0.1, 2, True, "l2", "fp32")
    adversarial.metric_perturb(x, _indices(4096), None, memory, _indices(65536), 0.1, 0.1, 1, False, "l2", "fp32")
    adversarial.metric_perturb(_rows(256, 768), _indices(256), None, None, None, 0.1, 0.1, 1, False, "linf", "fp32")
    adversarial.metric_perturb(_rows(256, 3840), _indices(256), None, None, None, 0.1, 0.1, 1, False, "linf", "fp32")


@case
def metric_perturb_of_half() -> None:
    x, memory = _rows(200, 768, dtype=torch.bfloat16), _rows(4096, 768, dtype=torch.bfloat16)
    labels = torch.empty(200, dtype=torch.int32, device="meta")
    adversarial.metric_perturb(x, labels, _rows(200, 768), memory, _indices(4096), 0.1, 0.1, 2, True, "linf", "fp32")
    adversarial.metric_perturb(
        _rows(64, 2048, dtype=torch.float16), _indices(64), None, None, None, 0.1, 0.1, 2, False, "l2", "fp32"
    )


@case
def negative_perturb() -> None:
    valid = torch.empty(64, dtype=torch.bool, device="meta")
    adversarial.negative_perturb(_rows(64, 2048), _rows(64, 4, 2048), valid, None, 0.1, 0.1, 10, False, "l2")
    adversarial.negative_perturb(_rows(64, 3840), _rows(64, 1, 3840), valid, None, 0.1, 0.1, 10, True, "linf")


def _ranking(
    queries: int, images: int, *, dtype: torch.dtype = torch.float32, precision: str = "fp32", euclidean: bool = True
) -> None:
    query = ranking.prepared_rows(_rows(queries, 2048, dtype=dtype), None, precision)
    half = _rows(images) if euclidean else None
    gallery = ranking.prepared_rows(_rows(images, 2048, dtype=dtype), half, precision)
    ranges, starts = (_indices(queries), _indices(queries)), _indices(queries + 1)
    ranking.similarities_of_tiles(query, gallery, *ranges, starts, _indices(queries // 16 + 1), 30 * queries)
    ranking.count_of_lists(query, gallery, *ranges, _rows(29 * queries), _indices(queries), _indices(queries))


@case
def ranking_fp32() -> None:
    _ranking(11659, 82161)
    _ranking(11659, 82161, euclidean=False)


@case
def ranking_tensor_cores() -> None:
    _ranking(3368, 19732, precision="tf32")
    _ranking(3368, 19732, precision="bf16")
    _ranking(3368, 19732, dtype=torch.float16)


def _neighbors(
    queries: int,
    images: int,
    k: int,
    *,
    dtype: torch.dtype = torch.float32,
    precision: str = "fp32",
    metric: str = "euclidean",
    excluding: bool = False,
) -> None:
    euclidean, half = metric == "euclidean", dtype != torch.float32
    query, gallery = _rows(queries, 2048, dtype=dtype), _rows(images, 2048, dtype=dtype)
    left_out: tuple[torch.Tensor | None, ...] = (None,) * 4
    if excluding:
        mask = torch.empty(queries, images, dtype=torch.bool, device="meta")
        left_out = _indices(queries), _indices(images), _indices(queries), mask
    operands = query, gallery, _rows(images) if euclidean else None, *left_out
    neighbors.group_maxima(*operands, k, 4, precision)
    last = torch.empty(queries, dtype=torch.int32, device="meta")
    neighbors.collect(*operands, _rows(queries), last, 8 * k + 64, precision)
    scale = torch.empty((), device="meta") if euclidean and not half else None
    neighbors.pair_sums(query, gallery, scale, _indices(queries, k), metric == "dot")


@case
def neighbors_fp32() -> None:
    _neighbors(11659, 82161, 100)
    _neighbors(11659, 82161, 2048, metric="dot")


@case
def neighbors_excluding() -> None:
    _neighbors(3368, 19732, 100, excluding=True)
    _neighbors(3368, 19732, 100, excluding=True, dtype=torch.float16)


@case
def neighbors_tensor_cores() -> None:
    _neighbors(3368, 19732, 100, precision="tf32")
    _neighbors(3368, 19732, 100, precision="bf16")
    _neighbors(3368, 19732, 100, dtype=torch.bfloat16)


def _maps(*shapes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]


def _ssd(features: torch.Tensor, logits: list[torch.Tensor]) -> None:
    permutation = _indices(len(features))
    outputs = ssd.ssd_mask_perturbed(features, logits, permutation)
    ssd.ssd_mask_backward(features, logits, permutation, outputs[3], *outputs[:3], True, True)


@case
def ssd_maps() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        features, *logits = _maps(*[(64, 768, 16, 8)] * 4, dtype=dtype)
        _ssd(features, logits)
    ssd.ssd_mask(features, logits)


@case
def ssd_one_channel() -> None:
    """Gradients summed over the channels, for either memory format, and logits in the other format."""
    features, full, shared = _maps((64, 768, 16, 8), (64, 768, 16, 8), (64, 1, 16, 8), dtype=torch.float16)
    _ssd(features, [shared, full, shared])
    _ssd(features.contiguous(memory_format=torch.channels_last), [full, shared])
    tokens, shared = _maps((64, 210, 768), (64, 210, 1), dtype=torch.float32)
    _ssd(tokens[:, 1:], [shared[:, 1:]])


def _memory(n: int, dimension: int, dtype: torch.dtype = torch.float32) -> None:
    x, valid = _rows(n, dimension, dtype=dtype), torch.empty(30000, dtype=torch.bool, device="meta")
    enqueued = torch.empty((), dtype=torch.int64, device="meta")
    memory.enqueue(_rows(65536, dimension, dtype=dtype), _indices(65536), enqueued, x, _indices(n), 0)
    memory.momentum_update(_rows(30000, dimension), valid, x, _indices(n), 0.2)


@case
def memories() -> None:
    _memory(256, 2048)
    _memory(256, 768, torch.bfloat16)
    _memory(64, 8192)


@over_sizes
def memories_over_sizes() -> None:
    for n in range(1, 301):
        _memory(n, 2048)


@over_sizes
def ssd_over_sizes() -> None:
    for n in range(1, 301):
        features, shared = _maps((n, 768, 16, 8), (n, 1, 16, 8), dtype=torch.float32)
        _ssd(features, [features, shared])


@over_sizes
def distance_over_sizes() -> None:
    for n in range(1, 301):
        g = _rows(n, 300)
        distance.pairwise_distance(_rows(n, 2048), _rows(300, 2048), Operands(), "euclidean", "fp32")
        distance.pairwise_distance_backward(g, g, _rows(n, 2048), None, "euclidean", "fp32", True, False)


@over_sizes
def triplet_over_sizes() -> None:
    for n in range(1, 301):
        x = _rows(n, 2048)
        losses.triplet_loss(x, None, Operands(), Pairing(_indices(n)), None, False, "euclidean", "fp32")
        mining.pair_gradient(x, None, _rows(n), _rows(n), _indices(n), _indices(n), _rows(1), "euclidean", True, False)


@over_sizes
def circle_loss_over_sizes() -> None:
    for n in range(1, 301):
        choices = "circle", 128.0, 0.25, "fp32", True, False
        contrastive.contrastive_loss(_rows(n, 2048), None, Operands(), Pairing(_indices(n)), *choices)


@over_sizes
def supervised_contrastive_loss_over_sizes() -> None:
    for n in range(1, 301):
        choices = Operands(), _ruled(n, 3 * n), "contrastive", 10.0, 0.0, "fp32", True, True
        contrastive.contrastive_loss(_rows(n, 2048), _rows(3 * n, 2048), *choices)


@over_sizes
def weighted_pairs_over_sizes() -> None:
    for n in range(1, 301):
        _weighted(_rows(n, 2048), _rows(3 * n, 2048), _ruled(n, 3 * n), "euclidean")


@over_sizes
def metric_perturb_over_sizes() -> None:
    for n in range(1, 301):
        x = _rows(n, 2048)
        adversarial.metric_perturb(x, _indices(n), None, None, None, 0.1, 0.1, 1, False, "linf", "fp32")


@over_sizes
def metric_perturb_solver_over_sizes() -> None:
    """Its matrices are padded to a power of two: a binary for each."""
    for n in range(33, 65):
        adversarial.metric_perturb(_rows(n, 2048), _indices(n), None, None, None, 0.1, 0.1, 1, False, "l2", "fp32")


@over_sizes
def metric_perturb_solver_of_several_programs_over_sizes() -> None:
    for n in range(129, 257):
        adversarial.metric_perturb(_rows(n, 2048), _indices(n), None, None, None, 0.1, 0.1, 1, False, "l2", "fp32")


@over_sizes
def perturbation_loss_over_sizes() -> None:
    for n in range(1, 301):
        _perturbation(n, _rows(n, 4, 2048), None)


@over_sizes
def perturbation_loss_in_bank_over_sizes() -> None:
    for n in range(1, 301):
        _perturbation(n, _rows(10 * n, 2048), _indices(n, 1 + n % 7))


@over_sizes
def ranking_over_sizes() -> None:
    for n in range(1, 301):
        _ranking(n, 2 * n)


@over_sizes
def neighbors_over_sizes() -> None:
    for n in range(1, 301):
        _neighbors(n, 2 * n, 10 + n % 50, excluding=True)  # the width of groups, 4 or 32, is the one bucket


@over_sizes
def prepared_distance_over_sizes() -> None:
    kept = prepared.prepare_rows(_rows(65536, 2048), True, "fp32")
    for n in range(1, 301):
        distance.pairwise_distance(_rows(n, 2048), _rows(65536, 2048), kept, "euclidean", "fp32")


ON_AMD = [
    distance_fp32,
    distance_split,
    distance_split_of_other_metrics,
    distance_gradient,
    paired,
    triplet_batch,
    mining_of_kept_rows,
    mining_in_large_batch,
    pair_gradient_by_sorting,
    contrastive_losses,
]
"""Compiled for AMD, too."""

ON_AMD_SOON = [distance_split, triplet_batch, contrastive_losses]
"""Of those, the ones of the default run."""

VARIANTS = [
    distance_split_of_other_metrics,
    distance_half,
    distance_bf16_of_fp32,
    triplet_sets_half,
    contrastive_losses_of_ruled_pairs,
    contrastive_losses_tensor_cores,
    contrastive_losses_half,
    weighted_pairs_tensor_cores,
    perturbation_loss_of_long_rows,
    metric_perturb_of_half,
    neighbors_excluding,
]
"""Kernels and tiles of other cases with other masks, precisions, metrics and dtypes: for the long run."""
