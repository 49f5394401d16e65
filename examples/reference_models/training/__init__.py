"""What the training scripts of the reference models share; it needs nothing of diffuse_compress."""
