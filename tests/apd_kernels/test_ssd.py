from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from conftest import Backend
from oracle import assert_close, leaf, peak_memory
from torch import Tensor
from traffic import counted

from apd_kernels import ssd, ssd_mask

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def served(backend: Backend, dtype: torch.dtype) -> None:
    if backend.name == "triton" and dtype == torch.float64:
        pytest.skip("float64 is served by the PyTorch path")


def oracle(features: Tensor, logits: list[Tensor], permutation: Tensor | None) -> list[Tensor]:
    """K, NK and K* as the method writes them."""
    attention = torch.stack([logit.sigmoid().expand_as(features) for logit in logits]).mean(0)
    relevant = attention * features
    irrelevant = features - relevant
    return [relevant, irrelevant] + ([] if permutation is None else [relevant + irrelevant[permutation]])


def maps(shape: tuple[int, ...], kinds: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Features and a logit for each letter: "f" of their shape, "1" of one channel."""
    generator = torch.Generator().manual_seed(seed)
    axis = 1 if len(shape) == 4 else 2
    shared = tuple(1 if dim == axis else size for dim, size in enumerate(shape))

    def drawn(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return drawn(shape), [2 * drawn(shape if kind == "f" else shared) for kind in kinds]


def assert_rounded(actual: Tensor, expected: Tensor, what: str) -> None:
    """Close to float64, and, in a half dtype, but for few elements the float64 value rounded: computed in float32."""
    assert_close(actual, expected, ROUNDING[actual.dtype], what)
    if actual.dtype.itemsize == 2 and actual.numel():
        assert (actual.cpu() == expected.to(actual.dtype)).double().mean() > 0.95, what


def check(
    backend: Backend,
    features: Tensor,
    logits: list[Tensor],
    permutation: Tensor | None,
    used: tuple[int, ...] | None = None,
) -> None:
    """Maps and gradients (through the outputs in `used`) against float64, dtype and memory format as they came."""
    ours_in, exact_in = (
        [leaf(x, device, dtype) for x in (features, *logits)]
        for device, dtype in ((backend.device, None), ("cpu", torch.float64))
    )
    ours = ssd_mask(ours_in[0], ours_in[1:], None if permutation is None else permutation.to(backend.device))
    exact = oracle(exact_in[0], exact_in[1:], permutation)
    if permutation is None:
        assert ours.perturbed is None
    for name, expected in zip(ours._fields, exact, strict=False):
        result = getattr(ours, name)
        assert result.dtype == features.dtype
        assert_rounded(result, expected, name)

    used = used or tuple(range(len(exact)))
    weights = [torch.randn(features.shape, generator=torch.manual_seed(i)).to(features.dtype) for i in used]
    gradients = torch.autograd.grad([ours[i] for i in used], ours_in, [w.to(backend.device) for w in weights])
    expected_gradients = torch.autograd.grad(
        [exact[i] for i in used], exact_in, [w.double() for w in weights], allow_unused=True
    )
    for i, (gradient, expected) in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert gradient.dtype == features.dtype
        assert_rounded(gradient, torch.zeros_like(exact_in[i]) if expected is None else expected, f"gradient {i}")


@pytest.mark.parametrize("kinds", ["fff", "f", "1", "1f1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 4, 3), (3, 7, 5)], ids=["map", "tokens"])
def test_matches_float64(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, kinds: str) -> None:
    served(backend, dtype)
    features, logits = maps(shape, kinds, dtype)
    check(backend, features, logits, torch.tensor([2, 0, 1]))
    check(backend, features, logits, None)
    if len(shape) == 4:
        features, *logits = (x.contiguous(memory_format=torch.channels_last) for x in (features, *logits))
        check(backend, features, logits, torch.tensor([1, 0, 2]))


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((1, 1, 1, 1), "f1"),
        ((37, 3, 2), "fff"),
        ((199, 1, 2, 1), "f"),
        ((2, 70, 40), "1"),  # tokens: several tiles of channels and of positions
        ((2, 40, 300), "1f"),
        ((1, 41, 7, 5), "1"),  # a map: the same
        ((2, 5, 41, 37), "fff"),  # several tiles of one run of memory
        ((0, 4, 3, 2), "f1"),
        ((3, 4, 0, 2), "f1"),
        ((2, 0, 4), "f1"),
    ],
)
def test_sizes(backend: Backend, shape: tuple[int, ...], kinds: str) -> None:
    if backend.interpreted and shape[0] > 100:
        pytest.skip("slow in the interpreter")
    features, logits = maps(shape, kinds, torch.float32)
    check(backend, features, logits, torch.randperm(shape[0], generator=torch.manual_seed(0)))


@pytest.mark.parametrize("kinds", ["fff", "1f1", "1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_on_a_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, kinds: str) -> None:
    """Images are taken in blocks, the last one smaller; partners lie in other blocks."""
    features, logits = maps((8, 5, 4, 3), kinds, dtype)
    monkeypatch.setattr(ssd.reference, "BLOCK_ELEMENTS", 3 * features[0].numel())
    permutation = torch.randperm(8, generator=torch.manual_seed(0))
    check(Backend("torch", "cpu"), features, logits, permutation)
    check(Backend("torch", "cpu"), features, logits, permutation, (1,))
    features, *logits = (x.contiguous(memory_format=torch.channels_last) for x in (features, *logits))
    check(Backend("torch", "cpu"), features, logits, permutation)


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stacked: bool) -> None:
    """3 maps, 4 gradients and some blocks; in a half dtype K and NK in float32 too, before the gradients."""
    features, logits = maps((64, 32, 8, 8), "fff", dtype)
    monkeypatch.setattr(ssd.reference, "BLOCK_ELEMENTS", 2 * features[0].numel())
    inputs = [x.requires_grad_() for x in (features, *logits)]
    weights, permutation = torch.randn(3 * 64, 32, 8, 8).to(dtype), torch.arange(64).roll(1)

    def step() -> tuple[Tensor, ...]:
        outputs = ssd_mask(inputs[0], inputs[1:], permutation, stacked=stacked)
        gradients = weights if stacked else weights.chunk(3)
        return *outputs, *torch.autograd.grad(outputs, inputs, gradients)

    step()
    assert peak_memory(step) < 7 * features.nbytes + 16 * 4 * ssd.reference.BLOCK_ELEMENTS


@pytest.mark.parametrize("kinds", ["ff", "f1"])
def test_strides(backend: Backend, kinds: str) -> None:
    """Slices, transposed memory and mixed formats give what contiguous copies give, in the format of the features."""
    wide, wide_logits = maps((3, 6, 5, 4), kinds, torch.float32)
    tokens, token_logits = maps((3, 9, 5), kinds, torch.float32, seed=1)
    last, plain = torch.channels_last, torch.contiguous_format
    permutation = torch.tensor([1, 2, 0], device=backend.device)
    for features, logits, expected_format in (
        (wide.contiguous(memory_format=last), wide_logits, last),
        (wide, [x.contiguous(memory_format=last) for x in wide_logits], plain),
        (wide[:, :, 1:, :3], [x[:, :, 1:, :3] for x in wide_logits], plain),
        (wide[:, ::2], [x[:, ::2] for x in wide_logits], plain),
        (wide.transpose(2, 3), [x.transpose(2, 3) for x in wide_logits], plain),
        (wide.contiguous(memory_format=last)[:, :, 1:], [x[:, :, 1:] for x in wide_logits], last),
        (tokens[:, 1:], [x[:, 1:] for x in token_logits], plain),
        (tokens.transpose(1, 2)[:, :, None, 1:], [x.transpose(1, 2)[:, :, None, 1:] for x in token_logits], last),
        (tokens[:1].expand(3, 9, 5), token_logits, plain),
    ):
        inputs = [x.to(backend.device).detach().requires_grad_() for x in (features, *logits)]
        copies = [leaf(x.contiguous(), backend.device) for x in (features, *logits)]
        ours = ssd_mask(inputs[0], inputs[1:], permutation)
        dense = ssd_mask(copies[0], copies[1:], permutation)
        weights = [torch.randn(features.shape, generator=torch.manual_seed(i)).to(backend.device) for i in range(3)]
        for result, expected in zip(ours, dense, strict=True):
            assert_close(result, expected, 1e-6)
            assert result.is_contiguous(memory_format=expected_format)
        for result, expected in zip(
            torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(dense, copies, weights), strict=True
        ):
            assert_close(result, expected, 2e-6)


@pytest.mark.parametrize("kinds", ["ff", "f1"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_unused_outputs(backend: Backend, used: tuple[int, ...], kinds: str) -> None:
    for dtype in (torch.float32, torch.float16):
        features, logits = maps((3, 4, 3, 2), kinds, dtype)
        check(backend, features, logits, torch.tensor([1, 2, 0]), used)
        if 2 not in used:
            check(backend, features, logits, None, used)


@pytest.mark.parametrize("kinds", ["ff", "f1"])
def test_partial_gradients(backend: Backend, kinds: str) -> None:
    """A gradient of the features alone, of one map alone, and expanded gradients are those of the whole."""
    features, logits = maps((3, 4, 3, 2), kinds, torch.float32)
    permutation = torch.tensor([1, 2, 0], device=backend.device)
    scales = (1.0, -2.0, 3.0)

    def gradients(wanted: set[int]) -> dict[int, Tensor]:
        inputs = [x.to(backend.device).requires_grad_(i in wanted) for i, x in enumerate((features.clone(), *logits))]
        outputs = ssd_mask(inputs[0], inputs[1:], permutation)
        sum(scale * x.sum() for scale, x in zip(scales, outputs, strict=True)).backward()
        result = {i: x.grad for i, x in enumerate(inputs) if x.grad is not None}
        for x in inputs:
            x.grad = None
            x.requires_grad_(False)
        return result

    everything = gradients({0, 1, 2})
    assert everything.keys() == {0, 1, 2}
    for wanted in ({0}, {1}, {2}, {0, 2}):
        some = gradients(wanted)
        assert some.keys() == wanted
        assert all(torch.equal(some[i], everything[i]) for i in wanted)
    exact = [leaf(x, dtype=torch.float64) for x in (features, *logits)]
    outputs = oracle(exact[0], exact[1:], permutation.cpu())
    sum(scale * x.sum() for scale, x in zip(scales, outputs, strict=True)).backward()
    for i, x in enumerate(exact):
        assert_close(everything[i], x.grad, 2e-6)


@pytest.mark.parametrize("kinds", ["fff", "f1"])
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((3, 5, 4, 3), torch.contiguous_format),
        ((3, 5, 4, 3), torch.channels_last),
        ((3, 7, 5), torch.contiguous_format),
        ((1, 2, 2), torch.contiguous_format),
        ((0, 4, 3, 2), torch.contiguous_format),
        ((3, 4, 0, 2), torch.contiguous_format),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stacked(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], memory_format: torch.memory_format, kinds: str
) -> None:
    """One batch of the maps in their order and format: the bits of the maps apart, and of their gradients."""
    served(backend, dtype)
    features, logits = maps(shape, kinds, dtype)
    features = features.contiguous(memory_format=memory_format)
    for permutation in (torch.arange(shape[0], device=backend.device).roll(1), None):
        apart, together = ([leaf(x, backend.device) for x in (features, *logits)] for _ in range(2))
        outputs = [x for x in ssd_mask(apart[0], apart[1:], permutation) if x is not None]
        stacked = ssd_mask(together[0], together[1:], permutation, stacked=True)
        assert stacked.dtype == dtype
        assert stacked.is_contiguous(memory_format=memory_format)
        assert torch.equal(stacked, torch.cat(outputs))
        weights = torch.randn(stacked.shape, generator=torch.manual_seed(0)).to(backend.device, dtype)
        gradients = (
            torch.autograd.grad(outputs, apart, weights.chunk(len(outputs))),
            torch.autograd.grad(stacked, together, weights),
        )
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_stacked_is_not_copied(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward operator is handed parts of the one gradient, where they lie."""
    features, logits = maps((3, 4, 2, 2), "f1", torch.float32)
    inputs = [leaf(x, backend.device) for x in (features, *logits)]
    stacked = ssd_mask(inputs[0], inputs[1:], torch.tensor([1, 2, 0], device=backend.device), stacked=True)
    gradient = torch.ones_like(stacked)
    handed: list[Tensor] = []
    backward = ssd._ssd_mask_backward
    monkeypatch.setattr(ssd, "_ssd_mask_backward", lambda *given: handed.extend(given[4:7]) or backward(*given))
    torch.autograd.grad(stacked, inputs, gradient)
    bytes_of_a_map = features.numel() * features.element_size()
    assert [x.data_ptr() - gradient.data_ptr() for x in handed] == [0, bytes_of_a_map, 2 * bytes_of_a_map]


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("shape", [(5, 6, 20, 17), (5, 40, 60)], ids=["map", "tokens"])
def test_memory_traffic(shape: tuple[int, ...], stacked: bool) -> None:
    """4 maps read and 3 written forward, 7 read and 4 written backward: from memory, each once.

    A partner's maps are read a second time by a program that comes less than B programs earlier or later, while what
    the programs between them touch, at most B tiles of each map, is still in the L2 cache. So this also fails when the
    grid is ordered another way.
    """
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("counted in the interpreter, which is used where there is no CUDA device")
    from apd_kernels.kernels import ssd as kernels

    features, logits = maps(shape, "fff", torch.float32)
    if features.dim() == 3:  # one map of another layout, so that positions and channels are tiled apart
        logits[0] = logits[0].transpose(1, 2).contiguous().transpose(1, 2)
    batch = shape[0]
    permutation = torch.tensor([4, 0, 1, 2, 3])
    with counted() as forward:
        if stacked:
            maps_out, inverse = kernels.ssd_mask_stacked(features, logits, permutation)
            written = list(maps_out.chunk(3))
        else:
            *written, inverse = kernels.ssd_mask_perturbed(features, logits, permutation)
    inputs = [features, *logits]
    for x in inputs:
        assert forward.read(x).times == {2}
        assert 0 < forward.read(x).apart < batch
    for x in written:
        assert forward.written(x).times == {1}
        assert forward.read(x).times == {0}

    gradients = [torch.ones_like(features) for _ in range(3)]
    with counted() as backward:
        to_features, to_logits = kernels.ssd_mask_backward(
            features, logits, permutation, inverse, *gradients, True, True
        )
    for x in (*inputs, *gradients[:2]):
        assert backward.read(x).times == {1}
    assert backward.read(gradients[2]).times == {2}
    assert 0 < backward.read(gradients[2]).apart < batch
    for x in (to_features, *to_logits):
        assert backward.written(x).times == {1}
        assert backward.read(x).times == {0}


def test_extreme_values(backend: Backend) -> None:
    """Saturated logits give exact 0 and 1 without overflow; a NaN reaches the images it is part of and no others."""
    features = torch.arange(1.0, 13.0).view(3, 2, 2, 1)
    logits = torch.tensor([200.0, -200.0, float("inf"), float("-inf")]).repeat(3).view(3, 2, 2, 1)
    permutation = torch.tensor([1, 2, 0], device=backend.device)
    inputs = [leaf(x, backend.device) for x in (features, logits)]
    relevant, irrelevant, _ = ssd_mask(inputs[0], inputs[1:], permutation)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 2, 2, 1)
    assert torch.equal(relevant.cpu(), features * keep)
    assert torch.equal(irrelevant.cpu(), features * (1 - keep))
    for gradient in torch.autograd.grad(relevant.sum() + irrelevant.sum(), inputs):
        assert gradient.isfinite().all()

    features, (full, shared) = maps((3, 2, 2, 2), "f1", torch.float32)
    features[2, 1, 0, 0] = float("nan")
    inputs = [leaf(x, backend.device) for x in (features, full, shared)]
    outputs = ssd_mask(inputs[0], inputs[1:], permutation)
    assert [x.isnan().sum((1, 2, 3)).tolist() for x in outputs] == [[0, 0, 1], [0, 0, 1], [0, 1, 1]]
    ones = [torch.ones_like(x) * (i + 1) for i, x in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, inputs, ones)
    assert [x.isnan().sum((1, 2, 3)).tolist() for x in gradients] == [[0, 0, 0], [0, 0, 1], [0, 0, 1]]


def test_bits_repeat(backend: Backend) -> None:
    features, logits = maps((4, 5, 4, 3), "f1", torch.float32)
    permutation = torch.tensor([1, 3, 0, 2], device=backend.device)
    runs = []
    for _ in range(2):
        inputs = [leaf(x, backend.device) for x in (features, *logits)]
        outputs = ssd_mask(inputs[0], tuple(inputs[1:]), permutation)
        runs.append((*outputs, *torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_not_a_permutation(backend: Backend) -> None:
    """The PyTorch path refuses it on the CPU; the kernels neither read nor write outside the batch, and give NaN."""
    features, (logit,) = maps((4, 2, 3), "1", torch.float32)
    for wrong, missing in (([1, 0, 3, 3], 2), ([1, 0, 4, 3], 2), ([1, 0, -1, 3], 2), ([2**40, 1, 2, 3], 0)):
        inputs = [leaf(x, backend.device) for x in (features, features, logit)]
        permutation = torch.tensor(wrong, device=backend.device)
        if backend.name == "torch":
            if backend.device == "cpu":
                with pytest.raises(ValueError, match=rf"permutation: expected each of 0 … 3 once, got no {missing}"):
                    ssd_mask(inputs[0], inputs[1:], permutation)
            continue
        outputs = ssd_mask(inputs[0], inputs[1:], permutation)
        outside = [not 0 <= entry < 4 for entry in wrong]
        assert outputs.perturbed.isnan().all(-1).all(-1).tolist() == outside
        for gradient in torch.autograd.grad(outputs.perturbed, inputs, torch.ones_like(inputs[0])):
            assert gradient.isnan().all(-1).all(-1).tolist() == [i == missing for i in range(4)]
    # Nobody wrote the inverse of an image that is not named: what lies there may look like one.
    permutation, stale = (torch.tensor(x, device=backend.device) for x in ([1, 0, 3, 3], [1, 0, 0, 2]))
    ones = torch.ones_like(inputs[0])
    x, *logits = (x.to(backend.device) for x in (features, features, logit))
    to_features, to_logits = ssd._ssd_mask_backward(
        x, logits, permutation, stale, None, None, ones, True, True, backend.name
    )
    for gradient in (to_features, *to_logits):
        assert gradient.isnan().all(-1).all(-1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("kinds", ["fff", "1f1"])
def test_gradcheck(kinds: str) -> None:
    for shape in ((3, 2, 2, 2), (3, 2, 3)):
        features, logits = maps(shape, kinds, torch.float64)
        inputs = [x.requires_grad_() for x in (features, *logits)]
        for permutation in (torch.tensor([1, 2, 0]), None):
            assert torch.autograd.gradcheck(
                lambda x, *maps, p=permutation: tuple(y for y in ssd_mask(x, maps, p) if y is not None), inputs
            )
            assert torch.autograd.gradcheck(lambda x, *maps, p=permutation: ssd_mask(x, maps, p, stacked=True), inputs)


@pytest.mark.parametrize("kinds", ["ff", "f1"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_operators(backend: Backend, memory_format: torch.memory_format, kinds: str) -> None:
    features, logits = maps((3, 4, 2, 2), kinds, torch.float32)
    features = leaf(features, backend.device).detach().contiguous(memory_format=memory_format).requires_grad_()
    logits = [leaf(x, backend.device) for x in logits]
    permutation = torch.tensor([1, 2, 0], device=backend.device)
    torch.library.opcheck(ssd._ssd_mask, (features, logits, backend.name))
    torch.library.opcheck(ssd._ssd_mask_perturbed, (features, logits, permutation, backend.name))
    for permuted in (permutation, None):
        torch.library.opcheck(ssd._ssd_mask_stacked, (features, logits, permuted, backend.name))
    plain = [x.detach() for x in logits]
    gradient = torch.randn_like(features).detach()
    for permuted, gradients, wanted in (
        ((permutation, permutation.argsort()), (gradient, gradient, gradient), (True, True)),
        ((permutation, permutation.argsort()), (None, None, gradient), (False, True)),
        ((None, None), (gradient, None, None), (True, False)),
    ):
        torch.library.opcheck(
            ssd._ssd_mask_backward, (features.detach(), plain, *permuted, *gradients, *wanted, backend.name)
        )


@pytest.mark.parametrize("stacked", [False, True], ids=["apart", "stacked"])
@pytest.mark.parametrize("permuted", [True, False])
def test_compiles_in_one_graph(backend: Backend, permuted: bool, stacked: bool) -> None:
    """One graph, and at most one recompilation over batch sizes."""
    torch.compiler.reset()  # the graphs of the cases before this one count toward the limit
    features, logits = maps((9, 3, 2, 2), "f1", torch.float32)
    features = features.contiguous(memory_format=torch.channels_last)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ssd_mask, fullgraph=True, backend=counter)
    for size in (9, 5, 3, 6):
        permutation = torch.arange(size, device=backend.device).roll(1) if permuted else None
        results = []
        for function in (compiled, ssd_mask):
            inputs = [leaf(x[:size], backend.device) for x in (features, *logits)]
            maps_out = function(inputs[0], inputs[1:], permutation, stacked=stacked)
            outputs = [maps_out] if stacked else [x for x in maps_out if x is not None]
            results.append((*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)))
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*results, strict=True))
    assert counter.frame_count <= 2


def test_ignores_autocast(backend: Backend) -> None:
    features, logits = maps((3, 4, 2, 2), "f1", torch.float32)
    inputs = [leaf(x, backend.device) for x in (features, *logits)]
    permutation = torch.tensor([1, 2, 0], device=backend.device)
    expected = ssd_mask(inputs[0], inputs[1:], permutation)
    weights = [x.detach() for x in expected]
    gradients = torch.autograd.grad(expected, inputs, weights)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        ours = ssd_mask(inputs[0], inputs[1:], permutation)
        results = (*ours, *torch.autograd.grad(ours, inputs, weights))
    assert all(torch.equal(a, b) for a, b in zip(results, (*expected, *gradients), strict=True))


x = torch.zeros(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], [x], None), TypeError, r"features: expected a torch.Tensor, got list"),
        ((x.int(), [x], None), TypeError, r"features: expected float16.*got torch.int32"),
        ((x[0, 0], [x], None), ValueError, r"features: expected shape \(B, C, H, W\) or \(B, L, C\), got \(4, 4\)"),
        ((x[:, :0], [x], None), ValueError, r"features: expected at least one channel, got shape \(2, 0, 4, 4\)"),
        ((x, x, None), TypeError, r"logits: expected a list or tuple of tensors, got Tensor"),
        ((x, [], None), ValueError, r"logits: expected at least one map, got none"),
        ((x, [x, x.half()], None), TypeError, r"logits\[1\]: expected torch.float32 as features, got torch.float16"),
        ((x, [x.to("meta")], None), ValueError, r"logits\[0\]: expected device cpu as features, got meta"),
        (
            (x, [x[:, :2]], None),
            ValueError,
            r"logits\[0\]: expected shape \(2, 3, 4, 4\) or \(2, 1, 4, 4\), got \(2, 2, 4, 4\)",
        ),
        ((x, [x], [1, 0]), TypeError, r"permutation: expected a torch.Tensor, got list"),
        ((x, [x], torch.tensor([1, 0]).int()), TypeError, r"permutation: expected torch.int64, got torch.int32"),
        ((x, [x], torch.tensor([0])), ValueError, r"permutation: expected shape \(2,\), got \(1,\)"),
    ],
)
def test_bad_input(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ssd_mask(*arguments)
