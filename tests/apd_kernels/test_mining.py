from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from conftest import Backend
from kernel_backends import on_kernels
from oracle import METRICS, assert_close, distances, features, leaf, masks, pairing_options, peak_memory, tolerance
from torch import Tensor

from apd_kernels import HardPairs, batch_hard, prepare_rows, triplet_loss, use_backend


def best(d: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Farthest positive and nearest negative distance of each anchor (0 where there is none), and validity."""
    if d.shape[-1] == 0:
        nothing = d.new_zeros(d.shape[:-1])
        return nothing, nothing, nothing.bool()
    farthest = d.masked_fill(~positive, -torch.inf).amax(-1)
    nearest = d.masked_fill(~negative, torch.inf).amin(-1)
    has_positive, has_negative = positive.any(-1), negative.any(-1)
    return (
        torch.where(has_positive, farthest, 0),
        torch.where(has_negative, nearest, 0),
        (has_positive & has_negative).expand(d.shape[:-1]),
    )


def check(
    mined: HardPairs,
    x: Tensor,
    labels: Tensor,
    y: Tensor | None,
    y_labels: Tensor | None,
    metric: str,
    relative: float,
    **pairing: Any,
) -> None:
    """The winners are as good as the best in float64 (equally good ones may differ), of the right identity."""
    d = distances(x, x if y is None else y, metric)
    positive, negative = masks(labels, y_labels, **pairing)
    farthest, nearest, valid = best(d, positive, negative)
    assert torch.equal(mined.valid.cpu(), valid)
    for distance, index, expected, mask in (
        (mined.distances.positive, mined.indices.positive.cpu(), farthest, positive),
        (mined.distances.negative, mined.indices.negative.cpu(), nearest, negative),
    ):
        assert_close(distance, expected, relative)
        exists = mask.any(-1).expand(index.shape)
        assert torch.equal(index >= 0, exists)
        assert torch.equal(index[~exists], torch.full_like(index[~exists], -1))
        if d.shape[-1]:
            chosen = d.gather(-1, index.clamp(min=0)[..., None])[..., 0]
            assert_close(torch.where(exists, chosen, 0), expected, relative, "distance of the chosen row")
            assert mask.expand(d.shape).gather(-1, index.clamp(min=0)[..., None])[..., 0][exists].all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_matches_float64(backend: Backend, dtype: torch.dtype, metric: str) -> None:
    """Winners, distances and the gradient of both, within a batch and against other rows."""
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")
    x, labels = features(37, 50, dtype=dtype)
    y, y_labels = features(70, 50, dtype=dtype, seed=1, identities=12)
    for rows, row_labels in ((None, None), (y, y_labels)):
        a, b = leaf(x, backend.device), None if rows is None else leaf(rows, backend.device)
        moved = None if row_labels is None else row_labels.to(backend.device)
        mined = batch_hard(a, labels.to(backend.device), b, moved, metric=metric)
        relative = 5 * tolerance(dtype)
        check(mined, x, labels, rows, row_labels, metric, relative)
        weights = torch.randn(2, 37, generator=torch.manual_seed(0), dtype=torch.float64)
        (mined.distances.positive * weights[0].to(a) + mined.distances.negative * weights[1].to(a)).sum().backward()

        p, q = leaf(x, dtype=torch.float64), None if rows is None else leaf(rows, dtype=torch.float64)
        d = distances(p, p if q is None else q, metric)
        for side, index in enumerate(mined.indices):
            chosen = d.gather(-1, index.cpu().clamp(min=0)[:, None])[:, 0]
            (chosen * weights[side] * (index.cpu() >= 0)).sum().backward(retain_graph=True)
        rounding = 1e-3 if dtype == torch.float16 else 5 * tolerance(dtype)
        assert_close(a.grad, p.grad, rounding, "gradient of x")
        if b is not None:
            assert_close(b.grad, q.grad, rounding, "gradient of y")


@pytest.mark.parametrize(("n", "m"), [(0, 0), (1, 0), (0, 3), (1, 1), (1, 199), (70, 65)])
def test_sizes(backend: Backend, n: int, m: int) -> None:
    """Odd sizes, a lone anchor, nothing to choose from: what is missing is -1, 0 and not valid, never an error."""
    x, labels = features(n, 7, dtype=torch.float32) if n else (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    y, y_labels = (
        features(m, 7, dtype=torch.float32, seed=1) if m else (torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))
    )
    for rows, row_labels in ((None, None), (y, y_labels)):
        a = leaf(x, backend.device)
        b = None if rows is None else rows.to(backend.device)
        mined = batch_hard(
            a, labels.to(backend.device), b, None if row_labels is None else row_labels.to(backend.device)
        )
        check(mined, x, labels, rows, row_labels, "euclidean", 1e-5)
        (mined.distances.positive.sum() + mined.distances.negative.sum()).backward()
        assert not a.grad.isnan().any()


def test_sets_strides_and_label_types(backend: Backend) -> None:
    """(S, N, D) shares the labels; strided rows and any integer type give the same bits."""
    x, labels = features(3, 24, 40, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    sets = batch_hard(x, labels)
    for s in range(3):
        alone = batch_hard(x[s], labels)
        assert torch.equal(alone.indices.positive, sets.indices.positive[s])
        assert torch.equal(alone.indices.negative, sets.indices.negative[s])
        assert_close(alone.distances.negative, sets.distances.negative[s], 1e-6)
    wide = torch.full((24, 50), float("nan"), device=backend.device)
    wide[:, 5:45] = x[0]
    for dtype in (torch.uint8, torch.int16, torch.int32):
        strided = batch_hard(wide[:, 5:45], labels.to(dtype))
        assert torch.equal(strided.indices.positive, sets.indices.positive[0])


def test_labels_with_strides(backend: Backend) -> None:
    """A column of a label table, an expanded label, labels of two integer types: by value, not by memory."""
    x, labels = features(12, 9, dtype=torch.float32)
    y, y_labels = features(20, 9, dtype=torch.float32, seed=1, identities=4)
    x, labels, y, y_labels = (t.to(backend.device) for t in (x, labels, y, y_labels))
    expected = batch_hard(x, labels, y, y_labels)
    table = torch.stack([labels, labels * 0 + 7], 1)
    strided = batch_hard(x, table[:, 0], y, torch.stack([y_labels, y_labels], 1)[:, 1])
    assert torch.equal(strided.indices.positive, expected.indices.positive)
    assert torch.equal(strided.indices.negative, expected.indices.negative)
    one = torch.zeros((), dtype=torch.int64, device=backend.device).expand(12)
    assert (batch_hard(x, one).indices.negative == -1).all()
    signed = torch.full((12,), -1, dtype=torch.int8, device=backend.device)
    unsigned = torch.full((20,), 255, dtype=torch.uint8, device=backend.device)
    assert (batch_hard(x, signed, y, unsigned).indices.positive == -1).all()


def test_offset_features(backend: Backend) -> None:
    """A common offset of 30 standard deviations: the winners are still as good as the best."""
    x, labels = features(24, 40, dtype=torch.float32)
    x = x + 30
    mined = batch_hard(x.to(backend.device), labels.to(backend.device))
    check(mined, x, labels, None, None, "euclidean", 1e-5)


def test_masked_nan_stays_out_of_the_gradient(backend: Backend) -> None:
    x, labels = features(9, 5, dtype=torch.float32)
    x[4, 1] = float("nan")
    a = leaf(x, backend.device)
    mined = batch_hard(a, labels.to(backend.device))
    torch.where(mined.distances.negative.isfinite(), mined.distances.negative, 0).sum().backward()
    assert not a.grad.isnan().any()


def test_second_derivatives_are_refused(backend: Backend) -> None:
    """An error instead of a gradient penalty that is silently zero."""
    x, labels = features(8, 5, dtype=torch.float32)
    a = leaf(x, backend.device)
    distance = batch_hard(a, labels.to(backend.device)).distances.positive.sum()
    (gradient,) = torch.autograd.grad(distance, a, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradient.square().sum().backward()


def test_ties_go_to_the_lowest_index(backend: Backend) -> None:
    """Exact duplicates far apart in the batch, so that they fall into different tiles and splits."""
    x = torch.zeros(150, 8)
    x[:, 0] = torch.arange(150) % 3
    labels = torch.arange(150) // 75
    mined = batch_hard(x.to(backend.device), labels.to(backend.device))
    # Anchor at 0: farthest positive is the first 2 of its identity; anchor at 1: the first 0 or 2; at 2: the first 0.
    first = torch.tensor([2, 0, 0]).repeat(50) + 75 * labels
    assert torch.equal(mined.indices.positive.cpu(), first)
    nearest = torch.tensor([0, 1, 2]).repeat(50) + 75 * (1 - labels)
    assert torch.equal(mined.indices.negative.cpu(), nearest)
    assert torch.equal(mined.distances.negative.cpu(), torch.zeros(150))


@pytest.mark.parametrize("metric", METRICS)
def test_nan_rows_win_and_show(backend: Backend, metric: str) -> None:
    """A NaN row wins for everybody who can choose it, with distance NaN; the others' lowest index wins for itself."""
    x, _ = features(12, 9, dtype=torch.float32)
    labels = torch.arange(12) // 4
    x[5, 3] = float("nan")
    mined = batch_hard(x.to(backend.device), labels.to(backend.device), metric=metric)
    positive, negative = mined.indices.positive.cpu(), mined.indices.negative.cpu()
    assert positive[[4, 6, 7]].tolist() == [5, 5, 5]
    assert negative[[0, 1, 2, 3, 8, 9, 10, 11]].tolist() == [5] * 8
    assert positive[5] == 4
    assert negative[5] == 0
    nan = mined.distances.positive.isnan().cpu() | mined.distances.negative.isnan().cpu()
    assert nan.all()
    assert mined.distances.positive[[0, 8]].isfinite().all()


def test_near_duplicates_keep_their_digits(backend: Backend) -> None:
    """Winners' distances come from differences: pairs 1e-4 apart at norm 30 have relative error 1e-3, not 100%."""
    x, _ = features(16, 64, dtype=torch.float64)
    x = (x * 4).repeat_interleave(2, 0)
    x[1::2] += 1e-5 * torch.randn(16, 64, dtype=torch.float64, generator=torch.manual_seed(3))
    x = x.float()
    labels = torch.arange(32) // 2
    mined = batch_hard(x.to(backend.device), labels.to(backend.device))
    expected = (x.double()[0::2] - x.double()[1::2]).norm(dim=1).repeat_interleave(2)
    assert_close(mined.distances.positive, expected, 1e-6)


def test_large_memory_in_blocks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The PyTorch path takes blocks of anchors and rows, the kernels take columns in splits: the same winners."""
    monkeypatch.setattr("apd_kernels.reference.mining.BLOCK_KEYS", 1000)
    monkeypatch.setattr("apd_kernels._core.rows.BLOCK_ELEMENTS", 100)
    x, labels = features(30, 6, dtype=torch.float32)
    y, y_labels = features(199, 6, dtype=torch.float32, seed=4, identities=10)
    mined = batch_hard(*(t.to(backend.device) for t in (x, labels, y, y_labels)))
    check(mined, x, labels, y, y_labels, "euclidean", 1e-5)


MIXED = {
    "one long row": lambda x: x.index_put((torch.tensor([0]),), x[0] * 1e6),
    "a third far away": lambda x: torch.where(torch.arange(len(x))[:, None] % 3 == 0, x + 1e4, x),
    "an offset, and a short row": lambda x: (x + 100).index_put((torch.tensor([1]),), x[1] * 1e-3),
}


@pytest.mark.parametrize("kind", MIXED)
def test_rows_of_mixed_size(backend: Backend, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long rows, a mean that is long because of them, an offset: short rows keep their digits among themselves."""
    if backend.interpreted:
        monkeypatch.setattr("apd_kernels.kernels.prepared.LARGE_PRODUCTS", 0)
    x, labels = features(40, 20, dtype=torch.float32, identities=8)
    x = MIXED[kind](x)
    mined = batch_hard(x.to(backend.device), labels.to(backend.device))
    d = distances(x, x, "euclidean")
    positive, negative = masks(labels)
    norms = x.double().norm(dim=1)
    for index, ours, expected in (
        (mined.indices.positive, mined.distances.positive, d.masked_fill(~positive, -torch.inf).amax(1)),
        (mined.indices.negative, mined.distances.negative, d.masked_fill(~negative, torch.inf).amin(1)),
    ):
        # d² is known to c·2⁻²⁴ (‖x‖ + ‖y‖)², with the longer of the rows that compete.
        exists = index.cpu() >= 0
        reach = norms + torch.maximum(norms[index.cpu()], norms.median())
        error = (ours.cpu().double() ** 2 - expected**2).abs()[exists]
        assert (error <= 32 * 2**-24 * reach[exists] ** 2).all()


def test_stale_rows_of_a_memory_do_no_harm(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that are not valid may hold anything finite, too: 1e9 in a quarter of them."""
    for large in (1 << 33, 0):
        if large == 0 and backend.name == "triton":
            monkeypatch.setattr("apd_kernels.kernels.prepared.LARGE_PRODUCTS", 0)
        x, labels = features(9, 16, dtype=torch.float32, identities=3)
        y, y_labels = features(80, 16, dtype=torch.float32, seed=1, identities=3)
        valid = torch.arange(80) >= 20
        y[~valid] = 1e9
        mined = batch_hard(*(t.to(backend.device) for t in (x, labels, y, y_labels)), y_valid=valid.to(backend.device))
        check(mined, x, labels, y, y_labels, "euclidean", 1e-5, y_valid=valid)


def test_rows_that_change_are_prepared_again(backend: Backend) -> None:
    bank = torch.randn(5, 3, generator=torch.manual_seed(0)).to(backend.device)
    kept = prepare_rows(bank)
    labels = torch.arange(5, device=backend.device)
    assert batch_hard(bank + 1, labels, kept, labels).valid.all()
    bank[0] = 7
    with pytest.raises(RuntimeError, match="y: its rows were changed in place after prepare_rows"):
        batch_hard(bank + 1, labels, kept, labels)


@on_kernels
def test_short_anchors_of_dot_products(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tiles above the diagonal: an anchor's scale beside a far longer row must not flush its keys to 0."""
    mining = pytest.importorskip("apd_kernels.kernels.mining")
    monkeypatch.setattr("apd_kernels.kernels.prepared.LARGE_PRODUCTS", 0)
    monkeypatch.setattr(mining, "TRIANGLE_ROWS", (1, 16384))
    x, labels = features(40, 20, dtype=torch.float32, identities=8)
    x *= 1e-8
    x[3] *= 1e26
    mined = batch_hard(x.to(backend.device), labels.to(backend.device), metric="dot")
    d = distances(x, x, "dot")
    _, negative = masks(labels)
    short = torch.arange(40) != 3
    chosen = d.gather(1, mined.indices.negative.cpu()[:, None])[:, 0]
    best_negative = d.masked_fill(~negative, torch.inf).amin(1)
    assert_close(chosen[short], best_negative[short], 1e-6)


def test_no_grid_is_too_long() -> None:
    """CUDA allows 65,535 programs on every axis but the first: 10⁷ rows, on either side."""
    pytest.importorskip("triton")
    from apd_kernels._core.operands import Operands
    from apd_kernels._core.pairing import Pairing
    from apd_kernels.kernels import contrastive, distance, mining, paired, weighting
    from apd_kernels.kernels._launch import recording

    many, few, nothing = torch.empty(10**7, 8, device="meta"), torch.empty(8, 8, device="meta"), Operands()
    of_many, of_few = (torch.empty(len(rows), dtype=torch.int64, device="meta") for rows in (many, few))
    saved = [torch.empty(8, device="meta")] * 6
    with recording(90) as launches:
        for x, y in ((few, many), (many, few)):
            for precision in ("fp32", "tf32"):
                distance.pairwise_distance(x, y, nothing, "euclidean", precision)
                pairs = torch.empty(len(x), len(y), device="meta")
                distance.pairwise_distance_backward(pairs, pairs, x, y, "euclidean", precision, True, True)
        pairing = Pairing(of_few, of_many)
        mining.batch_hard(few, many, nothing, pairing, "euclidean", "fp32")
        mining.pair_gradient(few, many, *saved[:2], of_few, of_few, None, "euclidean", True, True)
        contrastive.contrastive_loss(few, many, nothing, pairing, "circle", 10.0, 0.2, "fp32", True, True)
        weighting.weighted_pairs(few, many, nothing, pairing, "euclidean", "fp32")
        weighting.weighted_pairs_backward(*saved, few, many, nothing, pairing, "euclidean", "fp32", True, True)
        paired.paired_distance(many, many, "euclidean")
    assert all(max(launch.grid[1:], default=0) <= 65535 for launch in launches)


def test_memory_is_bounded() -> None:
    """No matrix: 3000 anchors against 100,000 rows, 1.2 GB of distances, take 10 MB, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(3000, 4, generator=generator), torch.randn(100_000, 4, generator=generator)
    labels, y_labels = torch.arange(3000), torch.arange(100_000) % 3000

    def step() -> None:
        triplet_loss(x.requires_grad_(), labels, y, y_labels).backward()

    with use_backend("torch"):
        assert peak_memory(step) < 16e6


@pytest.mark.parametrize("metric", METRICS)
def test_gradcheck(metric: str) -> None:
    x, labels = features(9, 5)
    y, y_labels = features(8, 5, seed=1, identities=3)
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: tuple(batch_hard(a, labels, metric=metric).distances), (x,))
    assert torch.autograd.gradcheck(
        lambda a, b: tuple(batch_hard(a, labels, b, y_labels, metric=metric).distances), (x, y)
    )


def test_same_bits_every_time(backend: Backend) -> None:
    """A hub that all anchors choose: its gradient is a long sum, always in the same order."""
    x, labels = features(65, 33, dtype=torch.float32, identities=2)
    x[7] *= 50
    runs = []
    for _ in range(3):
        a = leaf(x, backend.device)
        mined = batch_hard(a, labels.to(backend.device))
        (mined.distances.positive.sum() - mined.distances.negative.sum()).backward()
        runs.append(a.grad)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_compiles_in_one_graph(backend: Backend) -> None:
    x, labels = features(24, 12, dtype=torch.float32)
    labels = labels.to(backend.device)

    def function(a: Tensor) -> Tensor:
        mined = batch_hard(a, labels[: a.shape[0]])
        return (mined.distances.positive * mined.valid).sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    compiled(a).backward()
    function(b).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("metric", METRICS)
def test_seeded_cases(backend: Backend, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 random cases on the PyTorch path: sizes, sets, blocks, offsets, kept rows, who may be chosen by whom."""
    for seed in range(8 if backend.interpreted else 200):
        choose = random.Random(f"{metric} {seed}")
        monkeypatch.setattr("apd_kernels.reference.mining.BLOCK_KEYS", choose.choice((1, 700, 1 << 19)))
        monkeypatch.setattr("apd_kernels.reference.mining.BLOCK_ROWS", choose.choice((3, 256)))
        dtype = torch.float32 if backend.name == "triton" else choose.choice((torch.float32, torch.float64))
        sets = choose.choice(((), (choose.randint(1, 3),)))
        n, m, d = choose.randint(0, 40), choose.choice((None, choose.randint(0, 200))), choose.randint(2, 40)
        offset = choose.choice((0, 0, 20))
        identities = choose.randint(1, 12)
        x, labels = features(*sets, n, d, dtype=dtype, seed=seed, identities=identities)
        y = y_labels = given = None
        if m is not None:
            y, y_labels = features(*sets, m, d, dtype=dtype, seed=seed + 1, identities=identities)
            y = y + offset
            given = y.to(backend.device)
        x = x + offset
        options = pairing_options(choose, n, m)
        if given is not None and choose.random() < 0.3:
            given = prepare_rows(given, metric=metric)
        moved = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        mined = batch_hard(
            x.to(backend.device),
            labels.to(backend.device),
            given,
            None if y_labels is None else y_labels.to(backend.device),
            metric=metric,
            **moved,
        )
        # Products of rows with an offset are rounded at the square of the offset.
        relative = (5 if metric in ("euclidean", "sqeuclidean") or offset == 0 else 500) * tolerance(dtype)
        check(mined, x, labels, y, y_labels, metric, relative, **options)


def test_own_rows_in_a_gathered_batch(backend: Backend) -> None:
    """A batch against itself as `y`, own rows left out, is the batch without y: the form for ranks."""
    x, labels = features(30, 16, dtype=torch.float32)
    x, labels = x.to(backend.device), labels.to(backend.device)
    expected = batch_hard(x, labels)
    for rank in range(3):
        mine = slice(10 * rank, 10 * rank + 10)
        own = torch.arange(mine.start, mine.stop, device=backend.device)
        got = batch_hard(x[mine], labels[mine], x, labels, own=own)
        assert torch.equal(got.indices.positive, expected.indices.positive[mine])
        assert torch.equal(got.indices.negative, expected.indices.negative[mine])
        assert torch.equal(got.valid, expected.valid[mine])


def test_rows_that_are_not_valid_are_nobodys(backend: Backend) -> None:
    """Slots of a memory that hold NaN and anyone's label are neither chosen nor seen in the gradient."""
    x, labels = features(9, 6, dtype=torch.float32, identities=3)
    y, y_labels = features(20, 6, dtype=torch.float32, seed=1, identities=3)
    valid = torch.arange(20) % 3 > 0
    y[~valid] = float("nan")
    a = leaf(x, backend.device)
    mined = batch_hard(a, *(t.to(backend.device) for t in (labels, y, y_labels)), y_valid=valid.to(backend.device))
    check(mined, x, labels, y.nan_to_num(0), y_labels, "euclidean", 1e-5, y_valid=valid)
    (mined.distances.positive + mined.distances.negative).sum().backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("metric", METRICS)
def test_prepared_rows(backend: Backend, metric: str) -> None:
    """Rows that are kept give what rows give; a gradient for them is not asked for, and changes are not seen."""
    x, labels = features(20, 33, dtype=torch.float32)
    y, y_labels = features(50, 33, dtype=torch.float32, seed=1, identities=8)
    x, labels, y, y_labels = (t.to(backend.device) for t in (x + 3, labels, y + 3, y_labels))
    kept = prepare_rows(y, metric=metric)
    assert kept.shape == y.shape
    assert kept.nbytes() <= 2 * y.nbytes + 16 * len(y) + 4096
    a, b = leaf(x, backend.device), leaf(x, backend.device)
    from_kept, from_rows = (
        batch_hard(a, labels, kept, y_labels, metric=metric),
        batch_hard(b, labels, y, y_labels, metric=metric),
    )
    assert torch.equal(from_kept.indices.positive, from_rows.indices.positive)
    assert torch.equal(from_kept.indices.negative, from_rows.indices.negative)
    from_kept.distances.positive.sum().backward()
    from_rows.distances.positive.sum().backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("metric", METRICS)
def test_no_prepared_rows(backend: Backend, metric: str) -> None:
    """A memory that is still empty can be prepared, and has nothing to choose."""
    x, labels = features(5, 8, dtype=torch.float32)
    for shape in ((0, 8), (2, 0, 8)):
        kept = prepare_rows(torch.zeros(shape, device=backend.device), metric=metric)
        a = x.expand(*shape[:-2], 5, 8).to(backend.device)
        nobody = torch.zeros(0, dtype=torch.int64, device=backend.device)
        mined = batch_hard(a, labels.to(backend.device), kept, nobody, metric=metric)
        assert not mined.valid.any()
        assert (mined.indices.positive == -1).all()


@pytest.mark.parametrize(
    ("kept", "options", "error", "message"),
    [
        (
            ("euclidean", torch.float32),
            {"metric": "cosine"},
            ValueError,
            "prepared for metric 'cosine', got 'euclidean'",
        ),
        (("dot", torch.float32), {}, ValueError, "prepared for metric 'euclidean', got 'dot'"),
        (("euclidean", torch.float64), {}, TypeError, "expected torch.float32 as x, got torch.float64"),
        (("euclidean", torch.float32), {"precision": "bf16"}, ValueError, "prepared for precision 'bf16', got 'fp32'"),
    ],
)
def test_prepared_for_something_else(
    kept: tuple[str, torch.dtype], options: dict[str, str], error: type[Exception], message: str
) -> None:
    metric, dtype = kept
    rows = prepare_rows(torch.ones(5, 2, dtype=dtype), metric=metric, precision="fp32")
    with pytest.raises(error, match=message):
        batch_hard(FOUR, LABELS, rows, torch.zeros(5, dtype=torch.int64), **options)


FOUR, LABELS = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((FOUR.long(), LABELS), TypeError, r"x: expected float16, .*got torch.int64"),
        ((FOUR, LABELS, FOUR.half(), LABELS), TypeError, r"y: expected torch.float32 as x, got torch.float16"),
        ((FOUR, LABELS, FOUR.to("meta"), LABELS), ValueError, r"y: expected device cpu as x, got meta"),
        ((FOUR, LABELS.to("meta")), ValueError, r"labels: expected device cpu, got meta"),
        (
            (FOUR, torch.zeros(4, requires_grad=True)),
            TypeError,
            r"labels: expected an integer dtype, got torch.float32",
        ),
        ((FOUR, LABELS[:3]), ValueError, r"labels: expected shape \(4,\), got \(3,\)"),
        ((FOUR, LABELS.float()), TypeError, r"labels: expected an integer dtype, got torch.float32"),
        ((FOUR, LABELS.bool()), TypeError, r"labels: expected an integer dtype, got torch.bool"),
        ((FOUR, [0, 0, 1, 1]), TypeError, r"labels: expected a torch.Tensor, got list"),
        ((FOUR, LABELS, torch.zeros(5, 2)), ValueError, r"y_labels: expected with y, got None"),
        ((FOUR, LABELS, torch.zeros(5, 2), LABELS), ValueError, r"y_labels: expected shape \(5,\), got \(4,\)"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_hard(*arguments)


@pytest.mark.parametrize(
    ("with_y", "options", "error", "message"),
    [
        (False, {"own": LABELS}, ValueError, r"y: expected with own, got None"),
        (False, {"y_valid": LABELS[:1] > 0}, ValueError, r"y_valid: expected shape \(4,\), got \(1,\)"),
        (True, {"own": LABELS[:2]}, ValueError, r"own: expected shape \(4,\), got \(2,\)"),
        (True, {"own": LABELS.float()}, TypeError, r"own: expected an integer dtype, got torch.float32"),
        (True, {"y_valid": LABELS}, TypeError, r"y_valid: expected torch.bool, got torch.int64"),
        (True, {"y_valid": LABELS[:2] > 0}, ValueError, r"y_valid: expected shape \(4,\), got \(2,\)"),
        (False, {"domains": LABELS[:1]}, ValueError, r"domains: expected shape \(4,\), got \(1,\)"),
        (True, {"domains": LABELS}, ValueError, r"y_domains: expected with domains and y, got None"),
        (True, {"y_domains": LABELS}, ValueError, r"domains: expected with y_domains, got None"),
        (False, {"positives": "across"}, ValueError, r"domains: expected with positives='across', got None"),
        (False, {"negatives": "other"}, ValueError, r"negatives: expected 'all' or 'within' or 'across', got 'other'"),
        (False, {"precision": "fp8"}, ValueError, r"precision: expected"),
    ],
)
def test_bad_options(with_y: bool, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        batch_hard(FOUR, LABELS, *((FOUR, LABELS) if with_y else ()), **options)
