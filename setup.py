"""The packages; all else is in pyproject.toml, which cannot say both "find them" and "configs/ is apd.configs"."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["apd_kernels", "apd_kernels.*", "apd", "apd.*"]), "apd.configs"],
    package_dir={"apd.configs": "configs"},
)
