"""Memories of features to mine in: a ring of recent rows, and one centroid an identity."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from apd_kernels._core.backend import named_backend, resolve_backend
from apd_kernels._core.checks import check_features, check_floating, check_integers, check_number
from apd_kernels._core.operators import operator
from apd_kernels._core.rows import unit_rows
from apd_kernels.paired import paired_distance
from apd_kernels.reference import memory as reference

NO_LABEL = torch.iinfo(torch.int64).min  # the label of every slot of an empty memory: no batch may use it
MAX_DIMENSION = 8192  # the momentum update's kernel holds whole rows in registers; wider ones take the PyTorch path


class CrossBatchMemory(Module):
    """The last rows that were enqueued, with their labels: a ring buffer to mine in.

    Mine first, enqueue after the backward pass: `rows` then never holds the batch itself, so no anchor meets its own
    copy, and a batch's own pairs, which exclude the anchor by its index, come from ``batch_hard(x, labels)``.
    pytorch-metric-learning's `CrossBatchMemory` enqueues first, compares with the filled part, and drops every row's
    own copy; the rows of its queue and their order are the same as here after the same batches.

    Slots that were never written hold copies of the row in slot 0, with its label. A copy is as near as its original,
    so mining finds the distances, labels, validity and gradients that it would find among the written rows. (The
    original wins the tie, unless a library rounds the products of some columns differently.) A loss that sums over all
    rows must leave the copies out by `valid`. While nothing was enqueued every slot has the label `NO_LABEL`: no anchor
    has a positive, so none is valid.

    All state is in buffers on the device (`state_dict` has it); nothing waits for a GPU. Given the same rows in the
    same order, as `gather_features` returns them, it is the same on every rank; so keep it outside of
    DistributedDataParallel, which would broadcast it before every forward pass.

    Args:
        capacity: number of slots, at least 1.
        dimension: of a row, at least 1.
        dtype: of the rows, that of the features to mine with: float16, bfloat16, float32 or float64.
        device: of the buffers.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: XBM (Wang et al., CVPR 2020).

    >>> import torch
    >>> from apd_kernels import CrossBatchMemory, triplet_loss
    >>> memory = CrossBatchMemory(capacity=4, dimension=1)
    >>> x, labels = torch.tensor([[0.0], [1.0], [5.0]], requires_grad=True), torch.tensor([7, 7, 8])
    >>> loss = triplet_loss(x, labels) + triplet_loss(x, labels, *memory.rows())  # nothing to mine yet: 0
    >>> loss.backward()
    >>> memory.enqueue(x, labels)
    >>> memory.enqueue(x + 10, labels)
    >>> memory.features.flatten(), memory.labels, memory.pointer
    (tensor([11., 15.,  5., 10.]), tensor([7, 8, 8, 7]), tensor(2))
    """

    features: Tensor  # (capacity, dimension)
    labels: Tensor  # (capacity,), int64
    enqueued: Tensor  # 0-d, int64: how many rows ever were

    def __init__(
        self,
        capacity: int,
        dimension: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_count("capacity", capacity)
        _check_count("dimension", dimension)
        check_floating("dtype", torch.empty(0, dtype=dtype))
        self.register_buffer("features", torch.zeros(capacity, dimension, dtype=dtype, device=device))
        self.register_buffer("labels", torch.full((capacity,), NO_LABEL, device=device))
        self.register_buffer("enqueued", torch.zeros((), dtype=torch.int64, device=device))

    @property
    def pointer(self) -> Tensor:
        """The slot that the next row goes to, int64 0-d."""
        return self.enqueued % len(self.labels)

    @property
    def filled(self) -> Tensor:
        """The number of slots that were written, int64 0-d."""
        return self.enqueued.clamp(max=len(self.labels))

    @property
    def valid(self) -> Tensor:
        """Which slots were written, bool (capacity,)."""
        return torch.arange(len(self.labels), device=self.labels.device) < self.enqueued

    def rows(self) -> tuple[Tensor, Tensor]:
        """`y` and `y_labels` for mining: the buffers themselves, so enqueue after the backward pass of their loss."""
        return self.features, self.labels

    def enqueue(self, x: Tensor, labels: Tensor) -> None:
        """Write rows over the oldest ones; of more than `capacity` rows the last remain.

        Args:
            x: shape (N, dimension), any floating dtype; converted, detached.
            labels: identity of each row, shape (N,), any integer dtype, other than `NO_LABEL`. −1 is an identity like
                others: mine with ``y_valid=memory.labels != -1`` to leave it out.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        _check_batch(x, labels, self.features)
        n = x.shape[0]
        if n == 0:
            return
        skipped = max(0, n - len(self.labels))
        _enqueue(
            self.features,
            self.labels,
            self.enqueued,
            x.detach()[skipped:],
            labels[skipped:],
            skipped,
            resolve_backend(self.features),
        )
        self.enqueued.add_(n)

    def reset(self) -> None:
        """Forget every row."""
        self.features.zero_()
        self.labels.fill_(NO_LABEL)
        self.enqueued.zero_()

    def extra_repr(self) -> str:
        capacity, dimension = self.features.shape
        return f"capacity={capacity}, dimension={dimension}{_dtype_repr(self.features)}"


class ClusterMemory(Module):
    """One unit-length centroid an identity, moved by the samples of each batch with momentum.

    The samples count one after the other, in the order of the batch, each followed by a normalization:
    c ← (m·c + (1 − m)·x) / ‖m·c + (1 − m)·x‖. So of several samples of one identity the last weighs most, and the
    result depends on their order. All identities move at once; the samples of one are taken in turn.

    An identity that was never seen starts as its first sample, normalized; until then its centroid is 0 and its `valid`
    False. A sample that would leave no direction (norm 0) changes nothing. Samples of a label outside
    0 … identities − 1, as the −1 of outliers, are ignored.

    All state is in buffers on the device (`state_dict` has it); nothing waits for a GPU. Given the same samples in the
    same order, as `gather_features` returns them, it is the same on every rank; so keep it outside of
    DistributedDataParallel, which would broadcast it before every forward pass.

    Args:
        identities: number of identities, at least 1; their labels are 0 … identities − 1.
        dimension: of a centroid, at least 1.
        momentum: m, from 0 to 1: the share of the old centroid.
        hardest: of several samples of an identity in a batch only the least similar to its centroid counts (x·c, of
            equal ones the first): cluster-contrast's hard form.
        dtype: of the centroids, float32 or float64.
        device: of the buffers.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.

    Source: Cluster Contrast (Dai et al., ACCV 2022), SpCL (Ge et al., NeurIPS 2020).

    >>> import torch
    >>> from apd_kernels import ClusterMemory
    >>> memory = ClusterMemory(identities=3, dimension=2, momentum=0.5)
    >>> memory.update(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([1, 0, 1]))
    >>> memory.centroids
    tensor([[0.0000, 1.0000],
            [0.3162, 0.9487],
            [0.0000, 0.0000]])
    >>> memory.valid
    tensor([ True,  True, False])
    >>> logits = torch.tensor([[0.6, 0.8]]) @ memory.centroids.T / 0.05
    >>> logits.masked_fill(~memory.valid, float("-inf")).softmax(1)
    tensor([[0.0486, 0.9514, 0.0000]])
    """

    centroids: Tensor  # (identities, dimension)
    valid: Tensor  # (identities,), bool: the identity was seen

    def __init__(
        self,
        identities: int,
        dimension: int,
        *,
        momentum: float = 0.2,
        hardest: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_count("identities", identities)
        _check_count("dimension", dimension)
        self.momentum, self.hardest = momentum, hardest
        self._checked_momentum()
        self.register_buffer("centroids", torch.zeros(identities, dimension, dtype=dtype, device=device))
        self.register_buffer("valid", torch.zeros(identities, dtype=torch.bool, device=device))
        self._check_precision()

    def rows(self) -> tuple[Tensor, Tensor]:
        """`y` and `y_labels` for mining, a copy of the centroids and their identities.

        In place of an identity that was not seen stands one that was, with its label, so that nobody mines it; while
        none was, every label is `NO_LABEL`.
        """
        identity = torch.arange(len(self.valid), device=self.valid.device)
        row = torch.where(self.valid, identity, self.valid.int().argmax())
        return self.centroids[row], torch.where(self.valid.any(), row, NO_LABEL)

    def update(self, x: Tensor, labels: Tensor) -> None:
        """Move the centroids by a batch of samples, in its order.

        Args:
            x: shape (N, dimension), any floating dtype; detached, taken as they come: normalize them where the recipe
                does.
            labels: identity of each sample, shape (N,), any integer dtype.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape, device or range.
        """
        _check_batch(x, labels, self.centroids)
        self._check_precision()
        momentum = self._checked_momentum()
        if x.shape[0] == 0:
            return
        backend = resolve_backend(self.centroids)
        if backend == "triton" and x.shape[1] > MAX_DIMENSION:
            if named_backend() is not None:
                raise ValueError(f"x: the 'triton' backend takes at most {MAX_DIMENSION} dimensions, got {x.shape[1]}")
            backend = "torch"
        if self.hardest:
            labels = self._of_hardest(x.detach(), labels)
        _momentum_update(self.centroids, self.valid, x.detach(), labels, momentum, backend)

    def update_in_backward(self, x: Tensor, labels: Tensor) -> None:
        """`update` once in every backward pass that reaches `x`, as cluster-contrast's memory does.

        A loss that needs the centroids in its backward pass has to be computed from a copy of them, as `rows` is.

        Args:
            x, labels: as in `update`; `x` requires a gradient.

        Raises:
            TypeError, ValueError: as `update`; `x` without a gradient, which no backward pass reaches.
        """
        _check_batch(x, labels, self.centroids)
        if not x.requires_grad:
            raise ValueError("x: expected features that require a gradient, got some without")
        rows = x.detach()  # a hook that held x itself would keep its graph alive
        x.register_hook(lambda _: self.update(rows, labels))

    @torch.no_grad()
    def _of_hardest(self, x: Tensor, labels: Tensor) -> Tensor:
        """The labels with −1, which no identity has, for all but the least similar sample of each."""
        labels = labels.to(torch.int64)
        centroid = self.centroids[labels.clamp(0, len(self.valid) - 1)]
        similarity = paired_distance(x.to(centroid.dtype), centroid, metric="dot").neg()
        place = torch.arange(len(labels), device=labels.device)
        harder = (similarity[None] < similarity[:, None]) | (
            (similarity[None] == similarity[:, None]) & (place[None] < place[:, None])
        )
        return labels.masked_fill(((labels[:, None] == labels) & harder).any(1), -1)

    @torch.no_grad()
    def reset(self, x: Tensor, labels: Tensor) -> None:
        """Start anew from the normalized mean of each identity's rows; identities without a row were not seen.

        Args:
            x: shape (N, dimension), any floating dtype.
            labels: identity of each row, shape (N,), any integer dtype; rows of others than 0 … identities − 1 do not
                count.

        Raises:
            TypeError, ValueError: an argument of the wrong dtype, shape or device.
        """
        _check_batch(x, labels, self.centroids)
        self._check_precision()
        identities = len(self.valid)
        labels = labels.to(torch.int64)
        target = torch.where((labels >= 0) & (labels < identities), labels, identities)
        counts = target.new_zeros(identities + 1).index_add_(0, target, torch.ones_like(target))
        ordered = x.to(self.centroids.dtype)[target.argsort(stable=True)]
        # In the order of the rows, unlike index_add_ on a GPU. The counts need no check, which would wait for them.
        sums = torch.segment_reduce(ordered, "sum", lengths=counts, unsafe=True, initial=0)
        self.centroids.copy_(unit_rows(sums[:identities]))
        self.valid.copy_((self.centroids != 0).any(1))

    def _checked_momentum(self) -> float:
        check_number("momentum", self.momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum: expected at most 1, got {self.momentum}")
        return float(self.momentum)

    def _check_precision(self) -> None:
        if self.centroids.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"centroids: expected float32 or float64, got {self.centroids.dtype}")

    def extra_repr(self) -> str:
        identities, dimension = self.centroids.shape
        hardest = ", hardest=True" if self.hardest else ""
        of_rows = f"{hardest}{_dtype_repr(self.centroids)}"
        return f"identities={identities}, dimension={dimension}, momentum={self.momentum}{of_rows}"


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_batch(x: Tensor, labels: Tensor, rows: Tensor) -> None:
    check_features("x", x, sets=False)
    if x.shape[1] != rows.shape[1]:
        raise ValueError(f"x: expected shape (N, {rows.shape[1]}), got {tuple(x.shape)}")
    if x.device != rows.device:
        raise ValueError(f"x: expected device {rows.device} as the memory, got {x.device}")
    check_integers("labels", labels, x.shape[0], x.device)


def _dtype_repr(rows: Tensor) -> str:
    return "" if rows.dtype == torch.float32 else f", dtype={rows.dtype}"


def _fake(**_: object) -> None:
    return None


# Both write into the buffers that they are given. `skipped` rows in front of x count as enqueued, too.
_enqueue = operator(reference.enqueue, fake=_fake, mutates=("features", "labels"))
_momentum_update = operator(reference.momentum_update, fake=_fake, mutates=("centroids", "valid"))
