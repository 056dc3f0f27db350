"""Repositories to triples: sources, clones, mainline, window, endpoints, patches, proof."""
