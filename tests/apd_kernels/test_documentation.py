"""Every example in a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
from places import ROOT

import apd_kernels

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(apd_kernels.__path__, "apd_kernels.")
    if not name.startswith("apd_kernels.kernels")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith("apd_kernels.drop_in.") or str(error.name).startswith("apd_kernels"):
            raise
        pytest.skip(f"{error.name}, whose classes the module extends, is not installed")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_readme() -> None:
    """What the README shows is what happens."""
    readme = ROOT / "README.md"
    result = doctest.testfile(str(readme), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0


def test_public_functions_have_examples() -> None:
    """Each public function and class that is called shows how."""
    for name in apd_kernels.__all__:
        value = getattr(apd_kernels, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, (tuple, Exception))):
            assert ">>> " in (value.__doc__ or ""), name
