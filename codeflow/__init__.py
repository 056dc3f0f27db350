"""codeflow: git histories to training data that shows how code changes.

`import codeflow` costs nothing: the names below load on first use.

    from codeflow import build, load_recipe, read_sources, RunOptions
    build(Path("data"), load_recipe(None), read_sources(Path("list.txt")), progress)

    from codeflow import ShardDataset
    for row in ShardDataset("data"): ...
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from codeflow.dataset import Dataset
    from codeflow.errors import CodeflowError
    from codeflow.load import ShardDataset
    from codeflow.mine.sources import Source, read_sources
    from codeflow.pipeline import BuildResult, RunOptions, build
    from codeflow.recipe import Recipe, load_recipe
    from codeflow.report.progress import LineProgress, QuietProgress
    from codeflow.tokenizer import Tokenizer
    from codeflow.verify import Verification, verify

_HOME = {
    "BuildResult": "codeflow.pipeline",
    "CodeflowError": "codeflow.errors",
    "Dataset": "codeflow.dataset",
    "LineProgress": "codeflow.report.progress",
    "QuietProgress": "codeflow.report.progress",
    "Recipe": "codeflow.recipe",
    "RunOptions": "codeflow.pipeline",
    "ShardDataset": "codeflow.load",
    "Source": "codeflow.mine.sources",
    "Tokenizer": "codeflow.tokenizer",
    "Verification": "codeflow.verify",
    "build": "codeflow.pipeline",
    "load_recipe": "codeflow.recipe",
    "read_sources": "codeflow.mine.sources",
    "verify": "codeflow.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'codeflow' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


__all__ = [
    "BuildResult",
    "CodeflowError",
    "Dataset",
    "LineProgress",
    "QuietProgress",
    "Recipe",
    "RunOptions",
    "ShardDataset",
    "Source",
    "Tokenizer",
    "Verification",
    "__version__",
    "build",
    "load_recipe",
    "read_sources",
    "verify",
]
