"""FAISS: imported on first use, its indexes built from factory strings, trained, given parameters, put on a GPU."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from apd_kernels._core.processes import python

# FAISS on a GPU returns at most so many neighbours.
GPU_LARGEST_K = 2048


def import_faiss() -> Any:
    """FAISS, imported on first use."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            f"Gallery needs FAISS, which could not be imported ({error}); install it with: "
            "pip install 'apd-kernels[retrieval]'"
        ) from error
    return faiss


def search_device(device: str | torch.device | None, engine: str) -> torch.device:
    """The device asked for, or a GPU where `engine` finds one."""
    faiss = import_faiss()
    gpus, finder = (torch.cuda.device_count(), "PyTorch") if engine == "fused" else (int(faiss.get_num_gpus()), "FAISS")
    if device is None:
        return torch.device("cuda" if gpus else "cpu")
    chosen = torch.device(device)
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected 'cpu' or 'cuda', got {str(chosen)!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise RuntimeError(
            f"device: expected a GPU that {finder} can use, got {str(chosen)!r}; {finder} finds {gpus}"
            + ("" if engine == "fused" else " (the faiss-cpu wheel has no GPU code; on Linux: pip install faiss-gpu)")
        )
    return chosen


_ONE_ROW = """
import numpy, faiss
row = numpy.ones((1, 8), numpy.float32)
index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), int(sys.argv[1]), faiss.IndexFlatL2(8))
index.add(row)
assert index.search(row, 1)[1][0, 0] == 0
"""


@cache
def check_gpu(number: int) -> None:
    """RuntimeError where this FAISS cannot search on that GPU; asked once in a process, before the first search.

    FAISS ends the whole process when its build has no code for a GPU, so another process tries it: some seconds.
    """
    run = subprocess.run(python(_ONE_ROW, str(number)), capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return
    faiss = import_faiss()
    if "no kernel image" in run.stderr:
        major, minor = torch.cuda.get_device_capability(number) if torch.cuda.is_available() else ("?", "?")
        raise RuntimeError(
            f"device: expected a FAISS with code for cuda:{number} (sm_{major}{minor}), got faiss {faiss.__version__} "
            "without. The faiss-gpu wheel from 1.15 on has code for sm_70 to sm_90 (faiss-gpu-cu12 1.13 and 1.14 have "
            "none for sm_90): pip uninstall faiss-gpu-cu12 faiss-cpu; pip install 'faiss-gpu>=1.15'. Or search with "
            "device='cpu' or engine='fused'"
        )
    reason = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
    raise RuntimeError(
        f"device: faiss {faiss.__version__} cannot search on cuda:{number}: {reason}. Search with device='cpu' or "
        "engine='fused'"
    )


def to_gpu(index: Any, number: int) -> Any:
    """A copy on a GPU."""
    check_gpu(number)
    faiss = import_faiss()
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), number, index)


def flat_index(dim: int, metric: str) -> Any:
    faiss = import_faiss()
    return faiss.IndexFlatIP(dim) if metric in ("cosine", "dot") else faiss.IndexFlatL2(dim)


def build(dim: int, factory: object, metric: str) -> Any:
    """An empty index for inner products ("cosine" of unit rows, "dot") or squared distances."""
    faiss = import_faiss()
    if not isinstance(factory, str):
        raise TypeError(f"index: expected a FAISS factory string, got {type(factory).__name__}")
    if "IDMap" in factory:
        raise ValueError(f"index: expected a factory string without IDMap (the gallery has keys), got {factory!r}")
    measure = faiss.METRIC_INNER_PRODUCT if metric in ("cosine", "dot") else faiss.METRIC_L2
    try:
        return faiss.index_factory(dim, factory, measure)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"index: expected a factory string that FAISS can build for {dim} dimensions and {metric!r}, got "
            f"{factory!r}: {reason_of(error)}"
        ) from error


def reason_of(error: Exception) -> str:
    """FAISS's message without the place in its source."""
    return re.sub(r"^Error in .* at \S+:\d+: ", "", str(error).strip(), flags=re.DOTALL)


def parts(index: Any) -> list[Any]:
    """The index and those that it wraps or assigns its rows with, outermost first."""
    faiss = import_faiss()
    found = [faiss.downcast_index(index)]
    for name in ("index", "base_index", "quantizer"):
        inner = getattr(found[0], name, None)
        if isinstance(inner, faiss.Index):
            found += parts(inner)
    return found


def rows_to_train(index: Any) -> int:
    """The fewest rows from which the index can be trained: one for each centroid of its largest clustering."""
    faiss = import_faiss()
    needed = 1
    for part in parts(index):
        if isinstance(part, faiss.IndexIVF):
            needed = max(needed, int(part.nlist))
        if hasattr(part, "pq"):
            needed = max(needed, int(part.pq.ksub))
    return needed


def train(index: Any, rows: np.ndarray, factory: str) -> None:
    """ValueError where the rows are too few."""
    needed = rows_to_train(index)
    if len(rows) >= needed:
        try:
            index.train(rows)
            return
        except RuntimeError as error:
            asked = re.search(r"should be at least as large as number of clusters \((\d+)\)", str(error))
            if asked is None:
                raise ValueError(f"features: FAISS cannot train {factory!r} from them: {reason_of(error)}") from error
            needed = int(asked[1])
    raise ValueError(
        f"features: expected at least {needed} rows to train the index {factory!r}, got {len(rows)}; call "
        "train(features) with more rows first, or add more at once"
    )


def search_parameters(index: Any, given: Mapping[str, int]) -> Any:
    """FAISS's object for the named parameters; each is checked for the kind of index. None without any."""
    left = dict(given)
    for name, value in left.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            raise TypeError(f"parameters[{name!r}]: expected an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"parameters[{name!r}]: expected at least 1, got {value}")
    known: list[str] = []
    made = _parameters(index, left, known)
    if left:
        expected = " or ".join(map(repr, known)) or "none for this index"
        raise ValueError(f"parameters: expected {expected}, got {next(iter(left))!r}")
    return made if given else None


def _parameters(index: Any, left: dict[str, int], known: list[str]) -> Any:
    """Takes from `left` what is for this index or those inside it, and notes in `known` what there is."""
    if index is None:
        return None
    faiss = import_faiss()
    index = faiss.downcast_index(index)

    def taken(*names: str) -> dict[str, int]:
        known.extend(names)
        most = max(1, int(index.ntotal), int(getattr(index, "nlist", 1)))  # HNSW takes memory for what it is asked for
        return {name: min(int(left.pop(name)), most) for name in names if name in left}

    if isinstance(index, faiss.IndexPreTransform):
        inner = _parameters(index.index, left, known)
        return faiss.SearchParametersPreTransform(index_params=inner) if inner is not None else None
    if isinstance(index, faiss.IndexRefine):
        own = taken("k_factor")
        inner = _parameters(index.base_index, left, known)
        if inner is not None:
            return faiss.IndexRefineSearchParameters(**own, base_index_params=inner)
        return faiss.IndexRefineSearchParameters(**own) if own else None
    if isinstance(index, faiss.IndexIVF):
        own = taken("nprobe", "max_codes")
        inner = _parameters(index.quantizer, left, known)
        if inner is not None:
            return faiss.SearchParametersIVF(**({"nprobe": int(index.nprobe)} | own), quantizer_params=inner)
        return faiss.SearchParametersIVF(**own) if own else None
    if isinstance(index, faiss.IndexHNSW):
        own = taken("efSearch")
        return faiss.SearchParametersHNSW(**own) if own else None
    return None


def searched(index: Any, queries: np.ndarray, k: int, parameters: Any) -> tuple[np.ndarray, np.ndarray]:
    """FAISS's scores and positions, with search parameters: also where faiss.contrib.torch_utils, which
    pytorch-metric-learning imports, has put a search without them in its place."""
    search = getattr(index, "search_numpy", index.search)
    scores, positions = search(queries, k, params=parameters)
    return scores, positions


class ApproximateIndex:
    """An index of any factory string over the rows of a gallery; it proposes rows, by their positions there.

    FAISS cannot remove from every kind of index. So each of its entries, in the order in which they came, is mapped to
    the position of a row: −1 once the row was removed or replaced. `compact` fills the index anew.
    """

    def __init__(self, dim: int, factory: str, metric: str) -> None:
        self.factory = factory
        self._arguments = (dim, factory, metric)
        self.index = build(*self._arguments)
        self._positions = np.empty(0, np.int64)
        self._shared = False

    @property
    def is_trained(self) -> bool:
        return bool(self.index.is_trained)

    @property
    def entries(self) -> int:
        return len(self._positions)

    def adopt(self, index: Any, shared: bool) -> None:
        """Take a loaded index, `shared` with a file that must not be written; its entries are the rows in order."""
        self.index, self._shared = index, shared
        self._positions = np.arange(index.ntotal)

    def train(self, sample: np.ndarray, rows: np.ndarray) -> None:
        """Train anew from the sample, and fill with the rows; nothing has changed after an error."""
        index = build(*self._arguments)
        train(index, sample, self.factory)
        if len(rows):
            index.add(rows)
        self.adopt(index, shared=False)

    def add(self, added: np.ndarray, positions: np.ndarray, before: np.ndarray) -> None:
        """Index more rows; `before` are those of the gallery, in order, for an index that cannot take more."""
        self._own()
        try:
            self.index.add(added)
        except RuntimeError:  # NSG: filled at once or not at all
            after = before.copy()
            old = positions < len(before)
            after[positions[old]] = added[old]
            if not self.entries:  # too few first rows have left it half filled
                self.index.reset()
            self._refill(np.concatenate([after, added[~old]]))
            return
        self._positions = np.concatenate([self._positions, positions])

    def forget(self, positions: np.ndarray) -> None:
        """These rows are not proposed any more."""
        self._positions = np.where(np.isin(self._positions, positions), -1, self._positions)

    def renumber(self, kept: np.ndarray) -> None:
        """Rows of the gallery were removed: `kept`, bool (rows before,), are left."""
        after = np.append(np.where(kept, np.cumsum(kept) - 1, -1), -1)  # the last for entries that are −1 already
        self._positions = after[self._positions]

    @property
    def removed(self) -> int:
        """Entries that are of no row any more."""
        return int((self._positions < 0).sum())

    def compact(self, rows: np.ndarray, share: float = 0.0) -> None:
        """Fill anew from the gallery's rows where more than `share` of the entries are of no row any more."""
        if self.removed > share * self.entries:
            self._refill(rows)

    def search(self, queries: np.ndarray, candidates: int, parameters: Mapping[str, int]) -> np.ndarray:
        """Positions of rows, int64 (Q, candidates); −1 where there is none."""
        candidates = min(candidates, self.entries)
        made = search_parameters(self.index, parameters)
        entries = searched(self.index, queries, candidates, made)[1]
        return np.where(entries < 0, -1, self._positions[entries])

    def _refill(self, rows: np.ndarray) -> None:
        """Index these rows in place of all entries; ValueError, and nothing has changed, where FAISS refuses them."""
        faiss = import_faiss()
        index = faiss.deserialize_index(faiss.serialize_index(self.index))  # a copy, for what training found
        index.reset()
        try:
            if len(rows):
                index.add(rows)
        except RuntimeError as error:
            raise ValueError(f"features: FAISS cannot index them with {self.factory!r}: {reason_of(error)}") from error
        self.adopt(index, shared=False)

    def _own(self) -> None:
        """FAISS ends the process when an index in a mapped file is written to."""
        if self._shared:
            faiss = import_faiss()
            self.index, self._shared = faiss.deserialize_index(faiss.serialize_index(self.index)), False
