"""Near-duplicate removal of triples: keys and sketches (`sign`), then clusters (`cluster`).

What is compared is the change, not the repository: two triples are duplicates when an exact key
of theirs is equal or when the sets of word 5-grams of their changed lines overlap enough.
"""
