"""Losses by anchor and other reductions, and mining and losses of distances that somebody else has computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Backend
from oracle import assert_close, distances, features, leaf, masks, tolerance
from torch import Tensor

from apd_kernels import (
    Pairing,
    batch_hard,
    batch_hard_from_distances,
    circle_loss,
    cosface_loss,
    mining,
    paired_distance,
    ranked_pairs_from_distances,
    supervised_contrastive_loss,
    triplet_loss,
    triplet_loss_from_distances,
    triplets_from_distances,
    weighted_pairs,
    weighted_pairs_from_distances,
)
from apd_kernels._core import rows


def rows_of(*shape: int, seed: int = 0) -> Tensor:
    return features(*shape, seed=seed)[0]


REDUCTIONS = ("mean", "mean_all", "sum", "none")
LABELS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 0, 4])  # two identities of one image
LOSSES = {
    "hard": triplet_loss,
    "soft margin": lambda *rows, **options: triplet_loss(*rows, margin=None, **options),
    "weighted": lambda *rows, **options: triplet_loss(*rows, mining="weighted", **options),
    "circle": lambda *rows, **options: circle_loss(*rows, gamma=32.0, **options),
    "cosface": lambda x, labels, y=None, y_labels=None, **options: cosface_loss(
        x, Pairing(labels, y_labels, y_valid=options.pop("y_valid", None)), y, gamma=32.0, **options
    ),
    "contrastive": lambda *rows, **options: supervised_contrastive_loss(*rows, temperature=0.2, **options),
    "contrastive dot": lambda *rows, **options: supervised_contrastive_loss(
        *rows, temperature=3.0, metric="dot", **options
    ),
}


def _terms(loss: str, x: Tensor, y: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The term of every anchor in float64, and which count, from their formulas."""
    valid = positive.any(1) & negative.any(1)
    if loss in ("hard", "soft margin", "weighted"):
        d = distances(x, y, "euclidean")
        if loss == "weighted":
            of_positives = d.masked_fill(~positive, -torch.inf)[valid].softmax(1)
            of_negatives = (-d).masked_fill(~negative, -torch.inf)[valid].softmax(1)
            gap = d.new_zeros(len(d))
            gap[valid] = (of_positives * d[valid]).sum(1) - (of_negatives * d[valid]).sum(1)
        else:
            gap = d.masked_fill(~positive, -torch.inf).amax(1) - d.masked_fill(~negative, torch.inf).amin(1)
        return (F.softplus(gap) if loss == "soft margin" else (gap + 0.3).relu()), valid
    s = -distances(x, y, "dot") if loss == "contrastive dot" else 1 - distances(x, y, "cosine")
    if loss == "circle":
        a_p, a_n = (1.25 - s).detach().clamp(min=0), (s + 0.25).detach().clamp(min=0)
        of_p = torch.where(positive, -32 * a_p * (s - 0.75), -torch.inf).logsumexp(1)
        of_n = torch.where(negative, 32 * a_n * (s - 0.25), -torch.inf).logsumexp(1)
        return F.softplus(of_p + of_n), valid
    if loss == "cosface":
        of_p = torch.where(positive, -32 * s, -torch.inf).logsumexp(1)
        of_n = torch.where(negative, 32 * (s + 0.25), -torch.inf).logsumexp(1)
        return F.softplus(of_p + of_n), valid
    logits = s / (3.0 if loss == "contrastive dot" else 0.2)
    of_all = torch.where(positive | negative, logits, -torch.inf).logsumexp(1)
    count = positive.sum(1)
    return of_all - torch.where(positive, logits, 0).sum(1) / count.clamp(min=1), count > 0


def _reduced(terms: Tensor, valid: Tensor, reduction: str) -> Tensor:
    kept = torch.zeros_like(terms)
    kept[valid] = terms[valid]
    return {
        "none": kept,
        "sum": kept.sum(),
        "mean_all": kept.sum() / max(1, len(kept)),
        "mean": kept.sum() / max(1, int(valid.sum())),
    }[reduction]


@pytest.mark.parametrize("memory", [False, True], ids=["batch", "memory"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_match_float64(backend: Backend, loss: str, reduction: str, memory: bool) -> None:
    dtype = torch.float32 if backend.name == "triton" else torch.float64
    values = rows_of(10, 24, seed=1), rows_of(13, 24, seed=2)
    labels, y_labels = LABELS.to(backend.device), torch.arange(13, device=backend.device) % 5
    x, y = (leaf(rows, backend.device, dtype) for rows in values)
    found = LOSSES[loss](x, labels, *((y, y_labels) if memory else ()), reduction=reduction)
    weights = torch.linspace(0.5, 2, 10, dtype=dtype, device=backend.device) if reduction == "none" else 1
    (found * weights).sum().backward()
    a, b = (leaf(rows, dtype=torch.float64) for rows in values)
    pairs = masks(LABELS, y_labels.cpu() if memory else None)
    expected = _reduced(*_terms(loss, a, b if memory else a, *pairs), reduction)
    (expected * (weights.cpu().double() if reduction == "none" else 1)).sum().backward()
    error = tolerance(dtype) * (10 if loss in ("circle", "cosface", "weighted") else 1)
    assert_close(found, expected, error, "loss", scale=1.0)
    assert_close(x.grad, a.grad, 10 * error, "gradient of x", scale=1.0)
    if memory:
        assert_close(y.grad, b.grad, 10 * error, "gradient of y", scale=1.0)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_without_anchors(backend: Backend, loss: str, reduction: str) -> None:
    x = leaf(rows_of(3, 8), backend.device, torch.float32)
    found = LOSSES[loss](x, torch.arange(3, device=backend.device), reduction=reduction)
    assert torch.equal(found.cpu(), torch.zeros(3) if reduction == "none" else torch.tensor(0.0))
    found.sum().backward()
    assert not x.grad.any()
    none = LOSSES[loss](x[:0], torch.arange(0, device=backend.device), reduction=reduction)
    assert torch.equal(none.cpu(), torch.zeros(0) if reduction == "none" else torch.tensor(0.0))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_stays_in_the_terms_of_its_anchors(backend: Backend, loss: str) -> None:
    x = rows_of(6, 8).float().to(backend.device)
    x[5] = torch.nan
    labels = torch.tensor([0, 0, 1, 1, 2, 2], device=backend.device)
    kept = torch.tensor([True] * 5 + [False], device=backend.device)
    whole = LOSSES[loss](x, labels, reduction="none")
    assert whole.isnan().all()
    left_out = LOSSES[loss](x, labels, y_valid=kept, reduction="none")
    assert left_out[:4].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sets", [False, True], ids=["one", "sets"])
def test_winners_that_were_given(backend: Backend, reduction: str, sets: bool) -> None:
    x = rows_of(20, 8).float().view(2, 10, 8) if sets else rows_of(10, 8).float()
    x, labels = x.to(backend.device), LABELS.to(backend.device)
    expected, indices = triplet_loss(x, labels, return_indices=True, reduction=reduction)
    found = triplet_loss(x, labels, indices=indices, reduction=reduction)
    assert_close(found, expected, 1e-6, "loss", scale=1.0)
    assert found.shape == (x.shape[:-1] if reduction == "none" else x.shape[:-2])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("margin", "soft", "reverse"), [
    (0.3, False, False), (0.3, True, False), (None, False, True), (0.0, True, True), (2.0, False, True),
])  # fmt: skip
def test_terms_of_distances(margin: float | None, soft: bool, reverse: bool, reduction: str) -> None:
    positive, negative = (leaf(rows_of(7, 1, seed=s)[:, 0].abs(), dtype=torch.float64) for s in (1, 2))
    valid = torch.tensor([True, False, True, True, True, False, True])
    found = triplet_loss_from_distances(
        positive, negative, valid=valid, margin=margin, soft=soft, reverse=reverse, reduction=reduction
    )
    gap = (negative - positive if reverse else positive - negative) + (margin or 0)
    terms = (1 + gap.exp()).log() if soft or margin is None else gap.clamp(min=0)
    assert_close(found, _reduced(terms, valid, reduction), 1e-12, "loss", scale=1.0)
    found.sum().backward()
    assert not positive.grad[~valid].any()
    assert negative.grad[valid].any()


def test_an_anchor_left_out_keeps_its_nan_out() -> None:
    positive = torch.tensor([1.0, torch.nan], requires_grad=True)
    loss = triplet_loss_from_distances(positive, torch.tensor([1.0, 1.0]), valid=torch.tensor([True, False]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.3)
    assert positive.grad.tolist() == [1.0, 0.0]


def test_given_triplets() -> None:
    """All triplets of a batch within the margin, as miners of index tuples give them."""
    x = leaf(rows_of(10, 6), dtype=torch.float64)
    same = LABELS[:, None] == LABELS
    triplets = [
        (a, p, n) for a in range(10) for p in range(10) for n in range(10) if a != p and same[a, p] and not same[a, n]
    ]
    a, p, n = torch.tensor(triplets).T
    loss = triplet_loss_from_distances(paired_distance(x[a], x[p]), paired_distance(x[a], x[n]), margin=0.2)
    loss.backward()
    y = leaf(rows_of(10, 6), dtype=torch.float64)
    d = distances(y, y, "euclidean")
    expected = (d[a, p] - d[a, n] + 0.2).clamp(min=0).mean()
    expected.backward()
    assert_close(loss, expected, 1e-12, "loss")
    assert_close(x.grad, y.grad, 1e-10, "gradient", scale=1.0)


RULES: list[dict[str, Any]] = [
    {},
    {"memory": True},
    {"memory": True, "own": True},
    {"valid": True},
    {"domains": True, "positives": "across", "negatives": "within"},
    {"memory": True, "valid": True, "domains": True, "positives": "within", "negatives": "across"},
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules) or "labels")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_mining_of_a_matrix_is_that_of_its_rows(rules: dict[str, Any], dtype: torch.dtype) -> None:
    """The winners in the matrix, and the same winners and means as from the features, by the same pairing."""
    memory = "memory" in rules
    x, y = rows_of(12, 6, seed=3).double(), rows_of(9, 6, seed=4).double()
    labels, y_labels = torch.arange(12) % 4, torch.arange(9) % 4
    options = {key: value for key, value in rules.items() if key in ("positives", "negatives")}
    if "own" in rules:
        options["own"] = torch.arange(12) - 5
    if "valid" in rules:
        options["y_valid"] = (torch.arange(9 if memory else 12) % 3) > 0
    if "domains" in rules:
        options["domains"] = torch.arange(12) // 3 % 2
        options |= {"y_domains": torch.arange(9) // 3 % 2} if memory else {}
    others = (y, y_labels) if memory else ()
    matrix = distances(x, y if memory else x, "euclidean").to(dtype)
    pairing = Pairing(labels, y_labels if memory else None, **options)
    hard, weighted = batch_hard_from_distances(matrix, pairing), weighted_pairs_from_distances(matrix, pairing)
    of_rows = batch_hard(x, labels, *others, **options)
    error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2e-3}[dtype]
    assert torch.equal(hard.valid, of_rows.valid)
    assert torch.equal(weighted.valid, of_rows.valid)
    for found, expected, index, at in zip(
        hard.distances, of_rows.distances, hard.indices, of_rows.indices, strict=True
    ):
        assert found.dtype == dtype
        assert_close(found, expected, error, "distances", scale=1.0)
        assert torch.equal(index >= 0, at >= 0)
        assert dtype == torch.float16 or torch.equal(index, at)
    for found, expected in zip(
        weighted.distances, weighted_pairs(x, labels, *others, **options).distances, strict=True
    ):
        assert_close(found, expected, 5 * error, "means", scale=1.0)


def test_ties_nan_and_infinity_in_a_matrix() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    matrix = torch.tensor([
        [0, 2, 2, 3, 3],
        [2, 0, torch.nan, 1, 5],
        [torch.inf, torch.inf, 0, torch.inf, torch.inf],
        [9, 8, 8, 0, 7],
        [1, 1, 1, 1, 0],
    ])  # fmt: skip
    found = batch_hard_from_distances(matrix, Pairing(labels))
    assert found.indices.positive.tolist() == [1, 2, 0, 4, 3]
    assert found.indices.negative.tolist() == [3, 3, 3, 1, 0]
    assert found.distances.positive[1].isnan()
    assert found.distances.negative[2] == torch.inf


def test_gradients_through_a_matrix() -> None:
    matrix = rows_of(6, 6).double().abs().requires_grad_()
    pairing = Pairing(torch.tensor([0, 0, 1, 1, 1, 2]))

    def loss(d: Tensor) -> Tensor:
        hard, weighted = batch_hard_from_distances(d, pairing), weighted_pairs_from_distances(d, pairing)
        return torch.cat([*hard.distances, *weighted.distances])

    assert torch.autograd.gradcheck(loss, (matrix,))
    assert torch.autograd.gradgradcheck(loss, (matrix,))


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)], ids=str)
def test_empty_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.zeros(shape, requires_grad=True)
    pairing = Pairing(*(torch.zeros(size, dtype=torch.int64) for size in shape))
    hard, weighted = batch_hard_from_distances(matrix, pairing), weighted_pairs_from_distances(matrix, pairing)
    assert not hard.valid.any() and not weighted.valid.any()  # noqa: PT018
    for side in (*hard.distances, *weighted.distances):
        assert side.tolist() == [0.0] * shape[0]
        side.sum().backward()
    assert all(index.tolist() == [-1] * shape[0] for index in hard.indices)


LABELS_4 = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(("call", "kind", "message"), [
    (lambda: triplet_loss(torch.zeros(4, 2), LABELS_4, reduction="max"), ValueError, "reduction: expected 'mean' or"),
    (lambda: circle_loss(torch.zeros(4, 2), LABELS_4, reduction="no"), ValueError, "reduction: expected 'mean' or"),
    (lambda: supervised_contrastive_loss(torch.zeros(4, 2), LABELS_4, reduction=""), ValueError, "reduction: expected"),
    (lambda: triplet_loss_from_distances(torch.zeros(4), torch.zeros(3)), ValueError, r"negative: expected shape \(4,"),
    (lambda: triplet_loss_from_distances(torch.zeros(4), torch.zeros(4).half()), TypeError, "negative: expected torch"),
    (lambda: triplet_loss_from_distances(torch.zeros(4), torch.zeros(4), valid=torch.ones(4)), TypeError, "valid: exp"),
    (lambda: triplet_loss_from_distances(torch.zeros(4), torch.zeros(4), margin=None, soft=True), ValueError, "soft: "),
    (lambda: triplet_loss_from_distances([1.0], torch.zeros(1)), TypeError, "positive: expected a torch.Tensor, got l"),
    (lambda: batch_hard_from_distances(torch.zeros(4, 3), Pairing(LABELS_4)), ValueError, "pairing: expected y_labels"),
    (lambda: batch_hard_from_distances(torch.zeros(4), Pairing(LABELS_4)), ValueError, r"distances: expected shape"),
    (lambda: batch_hard_from_distances(torch.zeros(4, 4), LABELS_4), TypeError, "pairing: expected a Pairing, got Ten"),
    (lambda: weighted_pairs_from_distances(torch.zeros(3, 3), Pairing(LABELS_4)), ValueError, "labels: expected shape"),
    (lambda: weighted_pairs_from_distances(torch.zeros(4, 4).long(), Pairing(LABELS_4)), TypeError, "distances: exp"),
])  # fmt: skip
def test_wrong_arguments(call: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_compile_in_one_graph(loss: str) -> None:
    x, labels = rows_of(10, 8).float().requires_grad_(), LABELS

    def step(x: Tensor) -> Tensor:
        return LOSSES[loss](
            x, labels, reduction="mean_all" if "contrastive" in loss or loss in ("circle", "cosface") else "none"
        )

    expected = step(x)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    assert_close(found, expected, 1e-6, "compiled", scale=1.0)


@pytest.mark.parametrize("kind", ["all", "easy", "semi-hard", "hard"])
@pytest.mark.parametrize("memory", [False, True], ids=["batch", "memory"])
def test_triplets(kind: str, memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against loops, in blocks of any size; gaps of 0 and of the margin among them."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randint(0, 6, (10, 9 if memory else 10), generator=generator).double() / 4
    y_labels = torch.arange(9) % 5
    pairing = Pairing(LABELS, y_labels if memory else None)
    positive, negative = masks(LABELS, y_labels if memory else None)
    wanted = []
    for a, p in positive.nonzero().tolist():
        for n in negative[a].nonzero()[:, 0].tolist():
            gap = float(matrix[a, n] - matrix[a, p])
            chosen = {"all": True, "easy": gap > 0.5, "semi-hard": 0 < gap <= 0.5, "hard": gap <= 0}[kind]
            wanted += [(a, p, n)] if chosen else []
    assert wanted
    for elements in (mining.BLOCK_ELEMENTS, 50, 1):
        monkeypatch.setattr(mining, "BLOCK_ELEMENTS", elements)
        monkeypatch.setattr(rows, "BLOCK_ELEMENTS", elements)
        found = triplets_from_distances(matrix, pairing, kind=kind, margin=0.5)
        assert list(zip(*(side.tolist() for side in found), strict=True)) == wanted


def test_triplets_are_those_of_pytorch_metric_learning() -> None:
    miners = pytest.importorskip("pytorch_metric_learning.miners")
    x = rows_of(10, 6)
    for kind, theirs in (("semi-hard", "semihard"), ("easy", "easy"), ("hard", "hard")):
        wanted = miners.TripletMarginMiner(margin=0.2, type_of_triplets=theirs)(x, LABELS)
        matrix = distances(F.normalize(x), F.normalize(x), "euclidean")
        found = triplets_from_distances(matrix, Pairing(LABELS), kind=kind, margin=0.2)
        assert set(zip(*map(Tensor.tolist, found), strict=True)) == set(zip(*map(Tensor.tolist, wanted), strict=True))


@pytest.mark.parametrize("positives", [(1, 1), (2, 2), (1, 3), (4, 7)], ids=str)
@pytest.mark.parametrize("negatives", [(1, 1), (3, 12)], ids=str)
def test_ranges_of_hardness(positives: tuple[int, int], negatives: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randint(0, 5, (10, 10), generator=generator).double()
    matrix[3, 4], matrix[2, 0], matrix[2, 3], matrix[5, 1] = torch.nan, torch.nan, torch.inf, torch.inf
    found = ranked_pairs_from_distances(matrix, Pairing(LABELS), positives=positives, negatives=negatives)
    for side, mask, (first, last), sign in zip(found, masks(LABELS), (positives, negatives), (-1, 1), strict=True):
        assert side.shape == (10, last - first + 1)
        for i in range(10):
            places = mask[i].nonzero()[:, 0].tolist()
            order = sorted(places, key=lambda j: (not matrix[i, j].isnan(), sign * float(matrix[i, j]), j))
            wanted = order[first - 1 : last]
            assert side[i].tolist() == wanted + [-1] * (last - first + 1 - len(wanted))
    if positives == negatives == (1, 1):
        hardest = batch_hard_from_distances(matrix, Pairing(LABELS)).indices
        assert all(torch.equal(side[:, 0], other) for side, other in zip(found, hardest, strict=True))


@pytest.mark.parametrize("places", [(0, 1), (2, 1), (1,), [1, 2], (1.0, 2)], ids=str)
def test_wrong_ranges(places: Any) -> None:
    with pytest.raises(ValueError, match="negatives: expected a first and a last place, 1 or more, got"):
        ranked_pairs_from_distances(torch.zeros(4, 4), Pairing(LABELS_4), negatives=places)


def test_wrong_kinds() -> None:
    with pytest.raises(ValueError, match="kind: expected 'all' or"):
        triplets_from_distances(torch.zeros(4, 4), Pairing(LABELS_4), kind="medium")
    with pytest.raises(ValueError, match="margin: expected a finite number of at least 0, got -1"):
        triplets_from_distances(torch.zeros(4, 4), Pairing(LABELS_4), margin=-1)
    empty = triplets_from_distances(torch.zeros(0, 0), Pairing(LABELS_4[:0]))
    assert all(side.shape == (0,) and side.dtype == torch.int64 for side in empty)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_given_winners_leave_out(reduction: str) -> None:
    """A −1 takes no row: a NaN in row 0 stays out of the gradient, and there may be no row at all."""
    nan = torch.nan
    x = torch.tensor([[nan, nan], [0.0, 0.0], [1.0, 0.0], [3.0, 0.0]], requires_grad=True)
    labels = torch.tensor([9, 7, 7, 8])
    indices = torch.tensor([-1, 2, 1, -1]), torch.tensor([-1, 3, 3, -1])
    triplet_loss(x, labels, indices=indices, reduction=reduction).sum().backward()
    assert x.grad.isfinite().all()
    none = torch.full((4,), -1)
    loss = triplet_loss(x, labels, x[:0].detach(), labels[:0], indices=(none, none), reduction=reduction)
    assert not loss.detach().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "mean_all"])
def test_means_of_many_half_terms(dtype: torch.dtype, reduction: str) -> None:
    """Their sum is beyond 65,504."""
    ones = torch.ones(70_000, dtype=dtype)
    loss = triplet_loss_from_distances(ones, 0 * ones, margin=0.0, reduction=reduction)
    assert loss.dtype == dtype
    assert float(loss) == 1


def test_ranges_of_no_rows_and_nan_before_infinity() -> None:
    found = ranked_pairs_from_distances(torch.zeros(0, 0), Pairing(LABELS_4[:0]), negatives=(1, 3))
    assert found.negative.shape == (0, 3)
    distances = torch.tensor([[torch.inf, torch.nan, 1.0, 2.0]])
    pairing = Pairing(torch.tensor([7]), torch.tensor([7, 7, 7, 8]))
    found = ranked_pairs_from_distances(distances, pairing, positives=(1, 3))
    assert found.positive.tolist() == [[1, 0, 2]]


def test_an_infinite_negative_has_no_weight() -> None:
    distances = torch.tensor([[0.0, 1.0, torch.inf, 2.0]], requires_grad=True)
    found = weighted_pairs_from_distances(distances, Pairing(torch.tensor([7]), torch.tensor([8, 7, 8, 8])))
    expected = weighted_pairs_from_distances(
        distances[:, [0, 1, 3]], Pairing(torch.tensor([7]), torch.tensor([8, 7, 8]))
    )
    assert_close(found.distances.negative, expected.distances.negative, 1e-6)
    found.distances.negative.sum().backward()
    assert distances.grad.isfinite().all()
