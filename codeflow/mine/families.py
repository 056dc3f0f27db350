"""Unit `families`: which repositories are forks of each other, and which one of them is mined.

Repositories whose mainlines start at the same root commit are one family. Its leader is the one
with the longest mainline; the rest are listed with the leader's name and not mined, so that one
history does not fill a dataset under a hundred names.
"""

from __future__ import annotations

from codeflow.recipe import Recipe
from codeflow.work import Counts, Work


def run(work: Work, recipe: Recipe) -> Counts:
    """Leave `leader` for every repository, from the facts of all units `fetch`.

    Facts in: `repos`, by repository: `root`, `mainline_commits`, `head`.
    """
    repos = work.facts["repos"]
    best: dict[str, tuple[int, str]] = {}
    for name, facts in repos.items():
        rank = (-int(facts["mainline_commits"]), name)
        best[facts["root"]] = min(rank, best.get(facts["root"], rank))
    collapse = recipe.mine.collapse_forks
    leaders = {name: best[f["root"]][1] if collapse else name for name, f in repos.items()}
    work.facts["by_repo"] = {name: {"leader": leader} for name, leader in leaders.items()}
    return {"forks": sum(name != leader for name, leader in leaders.items())}
