"""The tokenizer beside an exported model, so that `AutoTokenizer` finds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from codeflow.errors import UsageError
from codeflow.train.arguments import END
from codeflow.train.config import ModelConfig
from codeflow.train.vocabulary import token_ids

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  # around the turns of packed conversations
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMPANIONS = ("special_tokens_map.json", "chat_template.jinja", "tokenizer_config.json")


def copy_tokenizer(source: Path, folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Copy a `tokenizer.json` and its `tokenizer_config.json`, written where there is none.

    Args:
        source: `tokenizer.json`, or a folder with it and what belongs to it.
        folder: Where to.
        config: The model's, whose vocabulary must hold every id.

    Returns:
        What `config.json` and `generation_config.json` say about special tokens: `eos_token_id`
        and `pad_token_id`, or nothing where the tokenizer names no end token.

    Raises:
        UsageError: No tokenizer there, or it has ids that the model lacks.
    """
    file = source / "tokenizer.json" if source.is_dir() else source
    ids = token_ids(file)
    if ids and max(ids.values()) >= config.vocab_size:
        raise UsageError(
            f"{file}: has token id {max(ids.values())}, the model's vocabulary {config.vocab_size}"
        )
    shutil.copyfile(file, folder / "tokenizer.json")
    if source.is_dir():
        for name in _COMPANIONS:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        settings.write_text(json.dumps(_settings(ids, config), indent=1) + "\n")
    try:
        content = json.loads(settings.read_text())
        end, padding = (_text(content.get(key)) for key in ("eos_token", "pad_token"))
    except (ValueError, AttributeError) as e:
        raise UsageError(f"{source / settings.name}: cannot be read: {e!r}") from e
    if end not in ids:
        return {}
    stops: int | list[int] = ids[end]
    if content.get("chat_template") == CHAT_TEMPLATE:
        stops = [ids[end], ids[TURN_END]]  # an answer ends with its turn
    return {"eos_token_id": stops, "pad_token_id": ids.get(padding, ids[end])}


def _settings(ids: dict[str | None, int], config: ModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,  # code comes back as it was
    }
    if END in ids:
        settings |= {"eos_token": END, "pad_token": END}
    if TURN_START in ids and TURN_END in ids:
        settings["chat_template"] = CHAT_TEMPLATE
    return settings


def _text(token: Any) -> str | None:
    """A special token is written as its text, or as an object that holds it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
