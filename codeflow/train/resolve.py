"""From what a user says (size, file, `--set`) to settings that fit the shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from codeflow.errors import UsageError, did_you_mean
from codeflow.load import Manifest
from codeflow.settings import build, read_toml, with_overrides
from codeflow.train.config import SIZES
from codeflow.train.recipe import RunConfig


def resolve(
    manifest: Manifest,
    *,
    steps: int | None = None,
    size: str | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Defaults < size < file < overrides < steps; the vocabulary is the manifest's if not said."""
    if size is not None and size not in SIZES:
        raise UsageError(f"--size {size}: unknown. {did_you_mean(size, SIZES)}")
    mapping: dict[str, Any] = {"model": {"vocab_size": manifest.vocab_size} | SIZES[size or "tiny"]}
    if config is not None:
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UsageError(f"--config {config}: cannot be read: {e}") from e
        for name, content in read_toml(text, str(config)).items():
            both = isinstance(content, dict) and isinstance(mapping.get(name), dict)
            mapping[name] = mapping[name] | content if both else content
    steps_override = [] if steps is None else [f"train.steps={steps}"]
    mapping = with_overrides(mapping, [*overrides, *steps_override])
    settings = build(RunConfig, mapping, str(config) if config else "--set")
    _check_fit(settings, manifest)
    return settings


def _check_fit(settings: RunConfig, manifest: Manifest) -> None:
    model, limit = settings.model, settings.train.max_length
    if model.vocab_size < manifest.vocab_size:
        raise UsageError(
            f"model.vocab_size {model.vocab_size} is smaller than the shards' "
            f"{manifest.vocab_size}; leave it out to use theirs"
        )
    if min(limit or manifest.length, manifest.length) > model.max_position_embeddings:
        raise UsageError(
            f"rows have up to {min(limit or manifest.length, manifest.length)} tokens, the model's "
            f"context is {model.max_position_embeddings}. Raise model.max_position_embeddings, "
            "pack shorter rows, or crop them with "
            f"train.max_length={model.max_position_embeddings} (the tokens cut off are counted)."
        )
