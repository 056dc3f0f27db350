"""What a model was trained on, kept beside its weights: no trained row shall be called held out.

Checkpoints have it as `trained_on.json`: for each set of shards the share that was kept back. The
rows of a smaller share are among those of a larger one, so the share says which rows they are.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from codeflow.load import Manifest
from codeflow.train.errors import CheckpointError

_NAME = "trained_on.json"


@dataclass(frozen=True)
class TrainedOn:
    """All rows of a set of shards but those held out.

    Attributes:
        shards: Folder of the shards then, for people.
        manifest_sha256: Of their manifest, which tells them from others wherever they are.
        holdout: Share of the rows that was held out.
    """

    shards: str
    manifest_sha256: str
    holdout: float


def write(folder: Path, data: Iterable[TrainedOn]) -> None:
    """Write the file into a folder of weights."""
    content = [dataclasses.asdict(each) for each in data]
    (folder / _NAME).write_text(json.dumps(content, indent=1) + "\n")


def read(folder: Path) -> list[TrainedOn]:
    """What is known; nothing of the weights of others.

    Raises:
        CheckpointError: The file is damaged.
    """
    file = folder / _NAME
    try:
        return [TrainedOn(**each) for each in json.loads(file.read_text())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as e:
        raise CheckpointError(
            f"{file}: cannot be read: {e!r}. Delete it; which rows were held out is then not known."
        ) from e


def held_out(folder: Path, manifest: Manifest) -> float | None:
    """Share of these rows that the model was never trained on; None where that is not known."""
    shares = [d.holdout for d in read(folder) if d.manifest_sha256 == manifest.sha256]
    return min(shares, default=None)
