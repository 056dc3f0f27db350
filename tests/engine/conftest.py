import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `engine_builds`


@pytest.fixture(scope="session")
def repositories(
    tmp_path_factory: pytest.TempPathFactory, sample_repository: Path
) -> tuple[Path, Path, Path]:
    """The sample repository and two small ones that have nothing in common."""
    from engine_builds import make_repository

    folder = tmp_path_factory.mktemp("repositories")
    return (
        sample_repository,
        make_repository(folder / "ledger.git", 1),
        make_repository(folder / "depot.git", 2),
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, repositories: tuple[Path, Path, Path]) -> Path:
    """A finished dataset of two repositories. Read it; never write to it."""
    from engine_builds import run_build

    out = tmp_path_factory.mktemp("built") / "data"
    run_build(out, repositories[:2])
    return out
