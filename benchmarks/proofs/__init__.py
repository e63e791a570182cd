"""Proofs that methods learn: each is a program of its own, and benchmarks/learning.py runs all of them."""
