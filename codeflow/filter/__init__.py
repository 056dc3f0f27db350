"""Judging triples: numbers first (`score`), decisions from numbers and the recipe after (`decide`).

Changing a threshold therefore costs a pass over one small table, not over the repositories.
"""
