"""What can go wrong in training, beside unusable settings and data."""

from codeflow.errors import CodeflowError


class TrainingError(CodeflowError):
    """Training cannot go on with these settings."""


class CheckpointError(CodeflowError):
    """A checkpoint or weights folder is missing, damaged, or of another model."""
