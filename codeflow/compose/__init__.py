"""Kept triples to training documents. A document kind is one pure function in one file."""
