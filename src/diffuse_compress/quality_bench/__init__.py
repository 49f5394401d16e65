"""``diffuse-compress bench quality``: models times formats times algorithms, one table."""
