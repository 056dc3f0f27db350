"""What the light parsers repeat of the heavy modules is the same there."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from codeflow.train import arguments
from codeflow.train.backends import BACKENDS
from codeflow.train.hf_export import Target


def test_choices_are_those_of_the_modules() -> None:
    assert set(arguments.BACKENDS) == set(BACKENDS)
    assert get_args(Target) == arguments.TARGETS
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in arguments.DTYPES)


@pytest.mark.parametrize("parser", ["evaluation", "generation", "conversion"])
def test_help_is_complete(parser: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        getattr(arguments, parser)().parse_args(["--help"])
    assert "usage: python -m codeflow.train." in capsys.readouterr().out
