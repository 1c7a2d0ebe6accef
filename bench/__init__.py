"""Benchmarks of fusedrnn against its peers; `python -m bench.compare` runs them."""
