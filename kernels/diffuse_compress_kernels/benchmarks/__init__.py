"""Benchmarks: run one as ``python -m diffuse_compress_kernels.benchmarks.<name>``."""
