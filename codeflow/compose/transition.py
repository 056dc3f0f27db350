"""The `transition` document: the old code, what was intended, and the change.

<|repo_name|>owner/name
<|file_sep|>src/a.py                 each changed file as it was, whole
…
<|commit_msg|>Messages of the commits
<|commit_after|>diff --git …         the net patch
<|endoftext|>
"""

from __future__ import annotations

from codeflow.compose.document import Example, Segment
from codeflow.recipe import ComposeSettings


def transition(example: Example, settings: ComposeSettings) -> list[Segment]:
    """Segments of one triple, in reading order; old files are optional, most changed first to stay.

    Raises:
        UnicodeDecodeError: The patch is not valid UTF-8.
    """
    segments = [Segment("repo", f"{example.repo_name}\n")]
    if settings.context == "changed":
        for change in example.changes:
            path = change["old_path"] or change["path"]
            if path in example.old_text:
                shown = path.decode("utf-8")
                text = f"{shown}\n{_line_ended(example.old_text[path])}"
                weight = change["lines_added"] + change["lines_deleted"]
                segments.append(Segment("context", text, shown, optional=True, priority=weight))
    messages = [m.strip() for m in example.messages if m.strip()][: settings.max_messages]
    if messages:
        segments.append(Segment("intent", "\n" + "\n\n".join(messages) + "\n"))
    patch = example.triple["patch"].decode("utf-8")
    segments.append(Segment("patch", "\n" + patch))
    return segments


def _line_ended(text: str) -> str:
    return text if text.endswith("\n") or not text else text + "\n"
