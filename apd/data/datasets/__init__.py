"""Data sets by name, in the layouts in which they are distributed."""

from apd.data.datasets.registry import DATASETS, DataSet, Published
from apd.data.datasets.specs import (
    DataSpec,
    differences,
    domains,
    has_parts,
    present_parts,
    read_dataset,
    read_source,
    ten_split_note,
)

__all__ = [
    "DATASETS",
    "DataSet",
    "DataSpec",
    "Published",
    "differences",
    "domains",
    "has_parts",
    "present_parts",
    "read_dataset",
    "read_source",
    "ten_split_note",
]
