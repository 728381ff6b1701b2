"""Putting adapters in place in projects of every import style, and taking them out again.

The projects are miniatures whose functions have the names and places of TransReID's and torchreid's, and return what no
adapter would. Their code is made known for a test.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from apd_kernels import drop_in
from apd_kernels.drop_in import replacing
from apd_kernels.drop_in.fingerprint import combined, definitions

LOSS = '''
def normalize(x, axis=-1):
    return x
def euclidean_dist(x, y):
    """Theirs."""
    return "theirs"
def cosine_dist(x, y):
    return "theirs"
def hard_example_mining(dist_mat, labels, return_inds=False):
    return "theirs"
class TripletLoss(object):
    def __init__(self, margin=None, hard_factor=0.0):
        self.margin, self.hard_factor = margin, hard_factor
    def __call__(self, global_feat, labels, normalize_feature=False):
        return "theirs"
'''
METRICS = """
from utils.reranking import re_ranking
def euclidean_distance(qf, gf):
    return "theirs"
def cosine_similarity(qf, gf):
    return "theirs"
def eval_func(distmat, q_pids, g_pids, q_camids, g_camids, max_rank=50):
    return "theirs"
class R1_mAP_eval:
    def __init__(self, num_query, max_rank=50, feat_norm=True, reranking=False):
        self.num_query, self.feat_norm, self.reranking = num_query, feat_norm, reranking
    def compute(self):
        return "theirs"
"""
RERANKING = """
def re_ranking(probFea, galFea, k1, k2, lambda_value, local_distmat=None, only_local=False):
    return "theirs"
"""
# `loss` is both a package and a function of the module that uses it; copies by star, under another name, in a package.
MAKE_LOSS = """
from .triplet_loss import *
from .triplet_loss import euclidean_dist as distance
def make_loss():
    def loss(x, labels):
        return TripletLoss(0.3)(x, labels)
    return loss
"""
FILES = {
    "loss/__init__.py": "from .make_loss import make_loss\nfrom .triplet_loss import hard_example_mining\n",
    "loss/triplet_loss.py": LOSS,
    "loss/make_loss.py": MAKE_LOSS,
    "utils/__init__.py": "",
    "utils/metrics.py": METRICS,
    "utils/reranking.py": RERANKING,
}
SCRIPT = """
import torch
from loss import make_loss
from utils.metrics import eval_func, R1_mAP_eval
loss = make_loss()
x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
print(type(loss(x, labels)).__name__, *map(str, eval_func(torch.eye(2), [1, 2], [1, 2], [0, 0], [1, 1])))
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A miniature of TransReID on the path, whose code is known; everything is undone afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    know(monkeypatch, tmp_path, "transreid")
    yield tmp_path
    drop_in.undo()
    for name in list(sys.modules):
        if name.split(".")[0] in ("loss", "utils", "torchreid"):
            del sys.modules[name]


def know(monkeypatch: pytest.MonkeyPatch, root: Path, project: str) -> None:
    known = {}
    for one in replacing.replacements(project):
        for module in one.modules:
            path = root / f"{module.replace('.', '/')}.py"
            if path.is_file():
                there = definitions(path)
                if all(name in there for name in (one.name, *one.helpers)):
                    known[one.key] = {combined([there[name] for name in (one.name, *one.helpers)]): "miniature"}
    monkeypatch.setattr(replacing, "KNOWN", known)


def states() -> dict[str, str]:
    return {f"{row.module}:{row.replacement.name}": row.state for row in drop_in.report().rows}


def test_modules_that_load_later_and_every_copy(project: Path) -> None:
    drop_in.apply("transreid")
    assert set(states().values()) == {"waiting"}
    loss, metrics = importlib.import_module("loss"), importlib.import_module("utils.metrics")
    triplets = importlib.import_module("loss.triplet_loss")
    made = sys.modules["loss.make_loss"]
    x, labels = torch.randn(8, 4), torch.arange(8) % 2
    assert isinstance(triplets.euclidean_dist(x, x), torch.Tensor)
    assert made.distance is made.euclidean_dist is triplets.euclidean_dist
    assert loss.hard_example_mining is triplets.hard_example_mining
    assert isinstance(loss.make_loss()(x, labels), tuple)
    assert metrics.eval_func(torch.eye(2), [1, 2], [1, 2], [0, 0], [1, 1])[1] == 0.5
    assert set(states().values()) == {"replaced"}
    text = str(drop_in.report())
    assert "transreid  loss.triplet_loss:TripletLoss.__call__" in text
    (row,) = (row for row in drop_in.report().rows if row.replacement.name == "euclidean_dist")
    assert row.calls == 1
    assert sorted(replacing.copies(row)) == [
        "loss.make_loss.distance", "loss.make_loss.euclidean_dist", "loss.triplet_loss.euclidean_dist",
    ]  # fmt: skip
    assert drop_in.undo() >= 9
    for module in (triplets, made):
        assert module.euclidean_dist(x, x) == "theirs"
    assert made.distance(x, x) == loss.hard_example_mining(x, x) == "theirs"
    assert loss.make_loss()(x, labels) == metrics.R1_mAP_eval(1).compute() == "theirs"
    assert str(drop_in.report()) == "drop_in: nothing replaced"
    assert replacing._finder not in sys.meta_path


def test_modules_that_are_loaded_and_instances_that_exist(project: Path) -> None:
    loss = importlib.import_module("loss")
    instance = sys.modules["loss.triplet_loss"].TripletLoss(0.3)
    x, labels = torch.randn(8, 4), torch.arange(8) % 2
    with drop_in.apply("transreid", only=["triplet"]) as applied:
        assert isinstance(instance(x, labels), tuple)
        assert isinstance(sys.modules["loss.make_loss"].distance(x, x), torch.Tensor)
        assert importlib.import_module("utils.metrics").eval_func(x, x, x, x, x) == "theirs"
        assert "transreid.TripletLoss.__call__" in repr(applied)
    assert instance(x, labels) == "theirs"
    assert loss.make_loss()(x, labels) == "theirs"


def test_what_is_named(project: Path) -> None:
    drop_in.apply("transreid", only=["TripletLoss", "re_ranking"])
    assert set(states()) == {"loss.triplet_loss:TripletLoss.__call__", "utils.reranking:re_ranking"}
    drop_in.undo()
    drop_in.apply("transreid", without=["triplet", "evaluator", "distances"])
    assert set(states()) == {"utils.reranking:re_ranking"}
    drop_in.undo()
    drop_in.apply_to_transreid(triplet=False, distances=False, rerank=False)
    assert {name.split(":")[0] for name in states()} == {"utils.metrics"}
    with pytest.raises(ValueError, match=r"only: expected a function or switch of transreid \(.*\), got nothing"):
        drop_in.apply("transreid", only=["nothing"])
    with pytest.raises(ValueError, match="project: expected 'transreid' or"):
        drop_in.apply("openmmlab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"theirs"\ndef hard', '"changed"\ndef hard'), "cosine_dist: unknown code"),
        (("def cosine_dist", "def cosine_distance"), "cosine_dist: no cosine_dist in"),
        (("return x\n", "return 2 * x\n"), "TripletLoss.__call__: unknown code"),  # of a helper
        (("def euclidean_dist(", "def euclidean_dist(("), "cannot be read"),
    ],
    ids=["code", "name", "helper", "syntax"],
)  # fmt: skip
def test_all_or_nothing(project: Path, change: tuple[str, str], message: str) -> None:
    path = project / "loss/triplet_loss.py"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(drop_in.DropInError, match=message):
        drop_in.apply("transreid")
    assert not drop_in.report().rows
    with pytest.warns(UserWarning, match=message):
        drop_in.apply()
    assert set(states().values()) == {"refused"}
    assert message.split(": ")[-1] in str(drop_in.report())
    assert importlib.import_module("utils.metrics").euclidean_distance(1, 1) == "theirs"
    drop_in.undo()
    if message.endswith("unknown code"):
        drop_in.apply("transreid", allow_unknown=True)
        assert importlib.import_module("utils.metrics").euclidean_distance(torch.eye(2), torch.eye(2)).shape == (2, 2)


def test_layout_comments_and_annotations_do_not_matter(project: Path) -> None:
    path = project / "loss/triplet_loss.py"
    text = path.read_text().replace("(x, y):", "(x: object,\n   y: object) -> str:  # a comment")
    path.write_text(text.replace('"theirs"', "'theirs'").replace('"""Theirs."""', '"""Another docstring."""'))
    drop_in.apply("transreid")
    assert set(states().values()) == {"waiting"}


def test_a_project_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(drop_in.DropInError, match=r"openreid: none of its modules is loaded or on the path: bau\."):
        drop_in.apply("openreid")
    assert not drop_in.report().rows


def test_modules_of_the_same_name_elsewhere(project: Path) -> None:
    """timm has a utils.metrics, too; a project within a package is the project."""
    for folder, text in (("other/utils", "def eval_func():\n    return 'other'\n"), ("mine/utils", METRICS)):
        (project / folder).mkdir(parents=True)
        (project / folder / "metrics.py").write_text(text)
    for name in ("utils.reranking", "other.utils.metrics", "mine.utils.metrics"):
        importlib.import_module(name)
    try:
        drop_in.apply("transreid", only=["eval_func"])
        assert set(states()) == {"utils.metrics:eval_func", "mine.utils.metrics:eval_func"}
        arguments = torch.eye(2), [1, 2], [1, 2], [0, 0], [1, 1]
        for name in ("utils.metrics", "mine.utils.metrics"):
            assert importlib.import_module(name).eval_func(*arguments)[1] == 0.5
        assert importlib.import_module("other.utils.metrics").eval_func() == "other"
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] in ("other", "mine")]:
            del sys.modules[name]


def test_what_keeps_the_original_is_said(project: Path) -> None:
    triplets = importlib.import_module("loss.triplet_loss")
    kept = functools.partial(triplets.euclidean_dist, 1)
    holder = types.SimpleNamespace(distance=triplets.euclidean_dist)
    with pytest.warns(UserWarning, match="2 partial functions, closures or objects made before keep the original"):
        drop_in.apply("transreid", only=["euclidean_dist"])
    assert kept(1) == holder.distance(1, 1) == "theirs"


def test_pickled_functions_are_found(project: Path) -> None:
    import pickle

    drop_in.apply("transreid")
    metrics = importlib.import_module("utils.metrics")
    assert pickle.loads(pickle.dumps(metrics.eval_func)) is metrics.eval_func


def test_check_compares_both_sides(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project / "utils/metrics.py"
    theirs = "    return ((qf[:, None] - gf[None]) ** 2).sum(-1).numpy()\ndef cos"
    path.write_text(path.read_text().replace('    return "theirs"\ndef cos', theirs))
    know(monkeypatch, project, "transreid")
    drop_in.apply("transreid", only=["euclidean_distance"])
    importlib.import_module("utils.metrics")
    (agreement,) = drop_in.check("transreid")
    assert agreement.function == "utils.metrics:euclidean_distance"
    assert agreement.difference < 1e-5
    assert agreement.ratio > 0
    assert "times as fast" in str(agreement)
    with pytest.raises(ValueError, match="project: expected"):
        drop_in.check("nobody")


def environment(root: Path) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if not name.startswith("APD_KERNELS_DROP_IN")}
    return found | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def launched(project: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apd_kernels.drop_in", *arguments]
    ended = subprocess.run(command, env=environment(project), cwd=project.parent, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return ended


def test_an_unedited_script(project: Path) -> None:
    """Run from elsewhere, with imports from its own folder; the report on request."""
    script = project / "train.py"
    script.write_text(SCRIPT + "import sys; print(sys.argv[1:], __name__)\n")
    ended = launched(project, "--allow-unknown", "--report", str(script), "--lr", "0.1")
    first, second = ended.stdout.splitlines()
    assert first.startswith("tuple [0. 1.] 0.5"), first
    assert second == "['--lr', '0.1'] __main__"
    assert "transreid  utils.metrics:eval_func                 replaced" in ended.stderr
    theirs = launched(project, str(script))  # code that is not known is left alone, with a warning
    assert theirs.stdout.splitlines()[0].startswith("str theirs"[:3])
    assert "transreid: nothing replaced" in theirs.stderr
    assert "no such script: nowhere.py" in launched(project, "nowhere.py", code=2).stderr


def test_spawned_workers(project: Path) -> None:
    """They start anew, and find the adapters in what they import, and the program's own functions."""
    (project / "spawn.py").write_text(
        "import multiprocessing, sys\n"
        "from loss.triplet_loss import euclidean_dist\n"
        "def work(number):\n"
        "    import torch\n"
        "    return number, type(euclidean_dist(torch.eye(2), torch.eye(2))).__name__\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, [1, 2]))\n"
    )
    ended = launched(project, "--allow-unknown", str(project / "spawn.py"))
    assert ended.stdout.strip() == "[(1, 'Tensor'), (2, 'Tensor')]"
    plain = subprocess.run(
        [sys.executable, str(project / "spawn.py")],
        env=environment(project),
        capture_output=True,
        text=True,
        check=True,
    )
    assert plain.stdout.strip() == "[(1, 'str'), (2, 'str')]"


def test_what_workers_are_told_is_forgotten(project: Path) -> None:
    import multiprocessing.spawn

    before = multiprocessing.spawn.get_preparation_data
    drop_in.apply("transreid", only=["rerank"])
    (call,) = json.loads(os.environ["APD_KERNELS_DROP_IN"])
    assert call["only"] == ["rerank"]
    assert multiprocessing.spawn.get_preparation_data is not before
    drop_in.undo()
    assert "APD_KERNELS_DROP_IN" not in os.environ
    assert multiprocessing.spawn.get_preparation_data is before


def test_every_function_has_known_code() -> None:
    """No replacement is listed that could never be put in place."""
    for project in drop_in.PROJECTS:
        for one in replacing.replacements(project):
            assert replacing.KNOWN[one.key], one.key
            assert callable(one.adapter)


def test_methods_of_a_class_in_another_package(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchreid of the package index lies under torchreid.reid."""
    folder = project / "torchreid/reid/losses"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent, folder.parent.parent):
        (path / "__init__.py").write_text("")
    (folder / "hard_mine_triplet_loss.py").write_text(
        "class TripletLoss:\n    def __init__(self, margin=0.3):\n        self.margin = margin\n"
        "    def forward(self, inputs, targets):\n        return 'theirs'\n"
    )
    know(monkeypatch, project, "torchreid")
    drop_in.apply_to_torchreid()
    module: Any = importlib.import_module("torchreid.reid.losses.hard_mine_triplet_loss")
    loss = module.TripletLoss(0.3).forward(torch.tensor([[0.0], [1.0], [1.5], [9.0]]), torch.tensor([7, 7, 8, 8]))
    assert float(loss) == pytest.approx(2.025)
