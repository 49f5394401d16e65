"""VBench on generated clips: prompt suite and names, completeness, the vbench package here or in an environment of its
own, and the published sums of scores.

Source: Huang et al. 2023, arXiv 2311.17982; facts of the ``vbench`` package 0.1.5 and of its repository's scripts.
"""
