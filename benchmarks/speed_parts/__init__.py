"""The parts of benchmarks/speed.py: each is a file with a function `measure`."""
