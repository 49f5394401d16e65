"""Triton kernels for CUDA devices: one file per kernel, each with its launcher.

``tiles.py`` describes tile shapes as data, ``tables.py`` holds the measured ones, ``unpack.py`` and ``grid.py`` are
shared pieces. Importing this package imports no triton; importing a kernel's module does.

Shapes: x [M, K] tokens by in_features, weight [N, K] out_features by in_features, both K-contiguous, y [M, N].
"""
