"""The phases of benchmarks/gpu.py; each a function of its name, from a setting and a record."""
