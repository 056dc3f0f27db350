"""How well a model predicts packed rows, in total and for every kind and role.

A target belongs to the segment that holds the token to predict, not to the one it is predicted
from: the first token of a patch counts as patch. Bits per byte compare models with different
vocabularies. Control tokens stand for no bytes of any text; they count in every loss but are left
out of bits per byte altogether, of its losses as well as of its bytes.

`python -m codeflow.train.evaluate` prints the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from codeflow.errors import CodeflowError, ShardError, UsageError
from codeflow.load import Manifest, PackedRow, Segments, ShardDataset, read_manifest
from codeflow.train.arguments import evaluation
from codeflow.train.attention import Documents
from codeflow.train.inference import open_model, weights_folder
from codeflow.train.loss import IGNORE, log_probabilities
from codeflow.train.model import LoopCoder
from codeflow.train.trained_on import held_out
from codeflow.train.vocabulary import require_same_tokens

_NO_ROLE = ""  # of documents without segments; packers name all roles


@dataclass(frozen=True)
class Score:
    """Cross-entropy over some targets.

    Attributes:
        nats: Sum of -ln p(target).
        targets: How many there are.
    """

    nats: float = 0.0
    targets: int = 0

    @property
    def loss(self) -> float:
        """Nats per target; not a number where there is none."""
        return self.nats / self.targets if self.targets else math.nan

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.targets + other.targets)


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some rows; `+` joins those of different rows, exactly.

    Attributes:
        rows: Rows evaluated.
        tokens: Tokens in them, whether targets or not.
        total: Over all targets.
        by_kind: Kind of document to score; empty where rows were read without them.
        by_role: Role of segment to score; targets in documents without segments are in none.
        text: Over targets that stand for bytes; empty where these are unknown.
        text_bytes: Bytes that the targets of `text` stand for.
    """

    rows: int = 0
    tokens: int = 0
    total: Score = Score()
    by_kind: Mapping[str, Score] = field(default_factory=dict)
    by_role: Mapping[str, Score] = field(default_factory=dict)
    text: Score = Score()
    text_bytes: int = 0

    @property
    def loss(self) -> float:
        """Nats per target."""
        return self.total.loss

    @property
    def bits_per_byte(self) -> float | None:
        """Bits to encode a byte of the targets' text; None where bytes are unknown."""
        return self.text.nats / math.log(2) / self.text_bytes if self.text_bytes else None

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.total + other.total,
            _joined(self.by_kind, other.by_kind),
            _joined(self.by_role, other.by_role),
            self.text + other.text,
            self.text_bytes + other.text_bytes,
        )

    def as_metrics(self) -> dict[str, float]:
        """Flat names for a log; groups without targets have no loss and are left out."""
        metrics = {
            "eval/loss": self.total.loss,
            **{f"eval/kind/{name}": score.loss for name, score in self.by_kind.items()},
            **{f"eval/role/{name}": score.loss for name, score in self.by_role.items()},
        }
        if self.bits_per_byte is not None:
            metrics["eval/bits_per_byte"] = self.bits_per_byte
        return {name: value for name, value in metrics.items() if not math.isnan(value)}


@dataclass(frozen=True)
class Chosen:
    """The rows that a command line evaluates, and what they are to the model.

    Attributes:
        share: Of the rows, those that a run with this `holdout` leaves out; None for all rows.
        held_out: Whether the model was trained on none of them; None where that is not known.
        meaning: The same for a person.
    """

    share: float | None
    held_out: bool | None
    meaning: str

    @property
    def part(self) -> dict[str, Any]:
        """Arguments of `ShardDataset`."""
        return {} if self.share is None else {"holdout": self.share, "part": "heldout"}


@torch.no_grad()
def evaluate(
    model: LoopCoder,
    rows: Iterable[PackedRow],
    device: torch.device | str,
    token_bytes: Tensor | None = None,
) -> Evaluation:
    """Score rows, one forward pass each; the logits of a whole row never exist.

    With a sharded model every process must give the same number of rows, for each pass is a
    collective one; the sum of the processes' evaluations is that of all rows.

    Args:
        model: On `device`, with activations of any dtype; losses are formed in float32.
        rows: Read `with_docs` for scores by kind and role.
        device: Where the model is.
        token_bytes: int64 (vocab_size,) on the CPU, from the function of that name; None leaves
            out bits per byte.
    """
    weight = model.head_weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    weight = weight.to(model.dtype)
    result = Evaluation()
    for row in rows:
        documents = Documents.of(row.doc_lens.tolist(), device)
        hidden = model(row.input_ids.to(device), documents).hidden
        log_p = log_probabilities(hidden, weight, row.labels.to(device)).cpu()
        result += _scored(row, -log_p.double().numpy(), token_bytes)
    return result


def token_bytes(tokenizer_json: Path, vocab_size: int) -> Tensor:
    """Bytes of text that each token stands for: int64 (vocab_size,).

    Control tokens, which are all that a tokenizer calls added, and ids that it lacks stand for 0.

    Raises:
        UsageError: The file is no tokenizer, is not byte-level (in others a token's bytes depend
            on its neighbours), or has ids that the model lacks.
    """
    try:
        content = json.loads(tokenizer_json.read_bytes())
        decoder, vocabulary = content["decoder"], content["model"]["vocab"]
        control = {int(token["id"]) for token in content["added_tokens"]}
        kinds = {part["type"] for part in (decoder, *decoder.get("decoders", []))}
        lengths = {int(id_): len(token) for token, id_ in vocabulary.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UsageError(f"{tokenizer_json}: cannot be read as a tokenizer.json: {e!r}") from e
    if "ByteLevel" not in kinds:
        raise UsageError(
            f"{tokenizer_json}: is not byte-level, so its tokens have no fixed number of bytes"
        )
    if (largest := max(lengths.keys() | control)) >= vocab_size:
        raise UsageError(f"{tokenizer_json}: has token {largest}; the model has {vocab_size} only")
    # Byte-level vocabularies write every byte as one character.
    table = torch.zeros(vocab_size, dtype=torch.int64)
    for id_ in lengths.keys() - control:
        table[id_] = lengths[id_]
    return table


def _scored(
    row: PackedRow, nats: npt.NDArray[np.float64], token_bytes: Tensor | None
) -> Evaluation:
    """The evaluation of a row with these losses, (T,) and 0 where there is no target."""
    labels, doc_lens = row.labels.numpy(), row.doc_lens.tolist()
    at = np.flatnonzero(labels != IGNORE)
    nats = nats[at]
    by_kind: dict[str, Score] = {}
    by_role: dict[str, Score] = {}
    if row.kinds:
        by_kind = _by_run(zip(row.kinds, doc_lens, strict=True), at, nats)
    if row.segments:
        # The token to predict is the next one, so its place decides.
        by_role = _by_run(_roles(row.segments, doc_lens), at + 1, nats)
        by_role.pop(_NO_ROLE, None)
    text, text_bytes = Score(), 0
    if token_bytes is not None:
        lengths = token_bytes.numpy()[labels[at]]
        is_text = lengths > 0
        text = Score(float(nats[is_text].sum()), int(is_text.sum()))
        text_bytes = int(lengths.sum())
    total = Score(float(nats.sum()), len(nats))
    return Evaluation(1, len(row.input_ids), total, by_kind, by_role, text, text_bytes)


def _roles(segments: Sequence[Segments], doc_lens: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The runs of a whole row, in which a document without segments is one run without a role."""
    for runs, length in zip(segments, doc_lens, strict=True):
        yield from runs or ((_NO_ROLE, length),)


def _by_run(
    runs: Iterable[tuple[str, int]], places: npt.NDArray[np.int64], nats: npt.NDArray[np.float64]
) -> dict[str, Score]:
    """Scores by the name of the run that each place lies in; runs are (name, tokens)."""
    names, lengths = zip(*runs, strict=True)
    number = np.repeat(np.arange(len(names)), lengths)[places]
    sums = np.bincount(number, weights=nats, minlength=len(names)).tolist()
    counts = np.bincount(number, minlength=len(names)).tolist()
    scores: dict[str, Score] = {}
    for name, run_nats, targets in zip(names, sums, counts, strict=True):
        if targets:
            scores[name] = scores.get(name, Score()) + Score(run_nats, targets)
    return scores


def _joined(a: Mapping[str, Score], b: Mapping[str, Score]) -> dict[str, Score]:
    return {**a, **{name: a.get(name, Score()) + score for name, score in b.items()}}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return execute(evaluation().parse_args(arguments))


def execute(options: argparse.Namespace) -> int:
    """Do what was typed; returns the exit code."""
    try:
        manifest = read_manifest(options.shards)
        folder = weights_folder(Path(options.checkpoint))
        kept = held_out(folder, manifest)
        chosen = _chosen(kept if options.holdout is None else options.holdout, kept, options.all)
        stream = ShardDataset(manifest, with_docs=True, **chosen.part)
        require_same_tokens(folder, manifest, "Evaluate on data packed with the model's tokenizer.")
        model, device = open_model(options)
        if manifest.vocab_size > model.config.vocab_size:
            raise UsageError(
                f"{options.shards}: packed with {manifest.vocab_size} token ids, the model has "
                f"{model.config.vocab_size}. Evaluate on data packed with the model's tokenizer."
            )
        lengths = _token_bytes_if_known(manifest, model.config.vocab_size)
        result = evaluate(model, islice(stream, options.rows), device, lengths)
        if not result.total.targets:
            raise ShardError(f"{options.shards}: none of these rows has a token to predict")
    except CodeflowError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if options.json:
        about = {"held_out": chosen.held_out, "share": chosen.share, "which": chosen.meaning}
        print(json.dumps(_as_json(result) | about))
    else:
        print(f"{chosen.meaning}\n{table(result)}")
    return 0


def _chosen(asked: float | None, kept: float | None, everything: bool) -> Chosen:
    """What to evaluate on.

    Args:
        asked: Share of the rows.
        kept: Share that the model was not trained on; None where that is not known.
        everything: All rows, whatever was asked for.

    Raises:
        UsageError: More rows asked for than were held out.
    """
    share = None if everything or asked == kept == 0 else asked
    rows = "all rows" if share is None else f"{share:.3g} of the rows"
    if kept is None:
        return Chosen(share, None, f"{rows}; whether the model was trained on them is not known")
    if share is None:
        trained = f"all but {kept:.3g} of them" if kept else "they"
        return Chosen(None, False, f"{rows}, not held out: {trained} are the model's training data")
    if share > kept:
        few = f"{kept:.3g}" if kept else "none"
        remedy = "Leave it out for these rows" if kept else "Set train.holdout in the next run"
        raise UsageError(
            f"--holdout {share:g}: the model's training held out {few} of these rows, the "
            f"others are its training data. {remedy}, or take --all."
        )
    return Chosen(share, True, f"held out: {rows}, none of which the model was trained on")


def table(result: Evaluation) -> str:
    """The result for a person: the totals, then a line for each kind and role."""
    in_bytes = result.bits_per_byte
    lines = [
        f"loss {result.loss:.4f} nats per target"
        + (f", {in_bytes:.4f} bits per byte" if in_bytes is not None else "")
        + f"; {result.total.targets:,} targets of {result.tokens:,} tokens in {result.rows:,} rows"
    ]
    for title, scores in (("kind", result.by_kind), ("role", result.by_role)):
        if not scores:
            lines += ["", f"by {title}: these shards do not say"]
            continue
        lines += ["", f"{title:24} {'loss':>8} {'targets':>14} {'share':>7}"]
        for name, score in sorted(scores.items(), key=lambda item: -item[1].targets):
            share = score.targets / result.total.targets
            lines.append(f"{name:24} {score.loss:8.4f} {score.targets:14,} {share:7.1%}")
    return "\n".join(lines)


def _token_bytes_if_known(manifest: Manifest, vocab_size: int) -> Tensor | None:
    try:
        return token_bytes(manifest.folder / "tokenizer.json", vocab_size)
    except UsageError as e:
        print(f"bits per byte are left out: {e}", file=sys.stderr)
        return None


def _as_json(result: Evaluation) -> dict[str, Any]:
    def entry(score: Score) -> dict[str, float]:
        return {"loss": score.loss, "targets": score.targets}

    return {
        "loss": result.loss,
        "bits_per_byte": result.bits_per_byte,
        "rows": result.rows,
        "tokens": result.tokens,
        "targets": result.total.targets,
        "by_kind": {name: entry(score) for name, score in result.by_kind.items()},
        "by_role": {name: entry(score) for name, score in result.by_role.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
