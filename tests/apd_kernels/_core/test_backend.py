"""Backend choice, and what importing the package costs and needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from apd_kernels import pairwise_distance, use_backend
from apd_kernels._core import backend as backend_module
from apd_kernels._core.backend import resolve_backend
from apd_kernels._core.precision import resolve_precision

pytestmark = pytest.mark.oldest


def test_automatic_choice_on_the_cpu() -> None:
    assert resolve_backend(torch.zeros(1)) == "torch"


@pytest.mark.gpu
def test_automatic_choice_on_a_gpu() -> None:
    assert resolve_backend(torch.zeros(1, device="cuda")) == "triton"
    assert resolve_backend(torch.zeros(1, device="cuda", dtype=torch.float64)) == "torch"


def test_named_backend_is_nested_and_restored() -> None:
    with use_backend("torch"):
        assert backend_module.named_backend() == "torch"
        with contextlib.suppress(ZeroDivisionError), use_backend("triton"):
            assert backend_module.named_backend() == "triton"
            _ = 1 / 0
        assert backend_module.named_backend() == "torch"
    assert backend_module.named_backend() is None


def test_named_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=r"name: expected 'triton' or 'torch', got 'cuda'"), use_backend("cuda"):
        pass
    with use_backend("triton"):
        monkeypatch.setattr(backend_module, "HAS_TRITON", True)
        monkeypatch.setattr(backend_module, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="expected CUDA tensors, got cpu"):
            pairwise_distance(x)
        monkeypatch.setattr(backend_module, "INTERPRETED", True)
        with pytest.raises(TypeError, match="float64 is served by the 'torch' backend only"):
            pairwise_distance(x.double())
        monkeypatch.setattr(backend_module, "HAS_TRITON", False)
        monkeypatch.setattr(backend_module, "TRITON_VERSION", None)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            pairwise_distance(x)
        monkeypatch.setattr(backend_module, "TRITON_VERSION", (3, 0))
        with pytest.raises(RuntimeError, match=r"backend 'triton': expected triton 3\.6 or newer, got 3\.0"):
            pairwise_distance(x)


@pytest.mark.parametrize("version", ["3.5.1", "3.0.0"])
def test_an_older_triton_is_left_alone(version: str) -> None:
    """PyTorch 2.4 to 2.9 bring versions that do not compile all kernels: PyTorch serves, a named backend says so."""
    code = f"""
import importlib.metadata
installed = importlib.metadata.version
importlib.metadata.version = lambda name: {version!r} if name == "triton" else installed(name)
import torch
from apd_kernels._core.backend import HAS_TRITON, missing_triton
assert not HAS_TRITON
print(missing_triton())
"""
    assert f"expected triton 3.6 or newer, got {version[:3]}" in _python(code).stdout


def test_every_thread_names_its_own_backend() -> None:
    found: list[str | None] = []
    with use_backend("torch"):
        other = threading.Thread(target=lambda: found.append(backend_module.named_backend()))
        other.start()
        other.join()
    assert found == [None]


def test_a_compiled_function_follows_the_named_backend() -> None:
    """What was compiled under one backend is not run under another."""
    x = torch.randn(8, 4)
    compiled = torch.compile(lambda rows: pairwise_distance(rows), fullgraph=True, backend="aot_eager")
    with use_backend("torch"):
        expected = compiled(x)
    with use_backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "INTERPRETED", False)
        with pytest.raises(Exception, match=r"expected CUDA tensors, got cpu|[Oo]bserved exception"):
            compiled(x)
    torch.testing.assert_close(compiled(x), expected)


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("APD_KERNELS_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=clean, capture_output=True, text=True)


def _forked(*codes: str) -> list[str]:
    """What each prints, its exception too, in a process of its own that has imported torch and nothing else of ours."""
    code = """
import os, sys, traceback, torch
for code in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            exec(code, {})
        except Exception:
            traceback.print_exc(file=sys.stdout)
        print(end="\\0", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    return _python(code, *codes).stdout.split("\0")[:-1]


def test_environment_variable_names_the_backend() -> None:
    code = """
import os
os.environ["APD_KERNELS_BACKEND"] = {!r}
import torch, apd_kernels
apd_kernels.pairwise_distance(torch.zeros(2, 2))
print("served")
"""
    pytorch, triton, wrong = _forked(*(code.format(name) for name in ("torch", "triton", "cuda")))
    assert pytorch == "served\n"
    assert "backend 'triton'" in triton
    assert "APD_KERNELS_BACKEND: expected 'triton' or 'torch', got 'cuda'" in wrong


def test_imports_and_runs_without_triton_and_faiss() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
hidden = ("triton", "faiss")
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in hidden else find(name, *rest)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import torch, apd_kernels
x = torch.randn(8, 4, requires_grad=True)
apd_kernels.triplet_loss(x, torch.arange(8) // 2).backward()
print(x.grad.shape)
"""
    result = _python(code)
    assert "torch.Size([8, 4])" in result.stdout, result.stderr


def test_import_is_quick_and_lean() -> None:
    """Under half a second beyond torch's own import, and neither faiss nor a kernel is loaded."""
    code = """
import sys, time
start = time.process_time()
import apd_kernels
print(time.process_time() - start)
print([name for name in sys.modules if name.startswith(("faiss", "apd_kernels.kernels"))])
"""
    outputs = [text.splitlines() for text in _forked(*[code] * 3)]
    assert min(float(lines[0]) for lines in outputs) < 0.5
    assert outputs[0][1] == "[]"


def test_precision_follows_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument wins; otherwise the newer switch, then the older one."""
    assert resolve_precision("bf16") == "bf16"
    switches = {"torch.set_float32_matmul_precision('highest')": "fp32"}
    switches["torch.set_float32_matmul_precision('high')"] = "tf32"
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        switches["torch.backends.cuda.matmul.fp32_precision = 'ieee'"] = "fp32"
        switches["torch.backends.cuda.matmul.fp32_precision = 'tf32'"] = "tf32"
    show = "from apd_kernels._core.precision import resolve_precision; print(resolve_precision(None))"
    found = _forked(*(f"import torch; {switch}\n{show}" for switch in switches))
    assert [text.strip() for text in found] == list(switches.values())


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_a_training_step() -> None:
    """The default torch.compile backend, once, with everything in one graph. In a process of its own: what PyTorch 2.4
    compiles switches the process that loads it to flushing small numbers to zero."""
    code = """
import torch
from apd_kernels import metric_perturb, triplet_loss

x = torch.randn(16, 8, requires_grad=True)
labels = torch.arange(16) // 4

def step(z):
    hard = metric_perturb(z, labels, epsilon=0.1, steps=2)
    return triplet_loss(z, labels) + 0.1 * triplet_loss(hard, labels, margin=None)

torch.compile(step, fullgraph=True)(x).backward()
compiled, x.grad = x.grad, None
step(x).backward()
torch.testing.assert_close(compiled, x.grad)
print("equal")
"""
    result = _python(code)
    assert result.stdout.strip() == "equal", result.stderr
