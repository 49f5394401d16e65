"""Quantization-aware training: layers that compute as the deployed ones will, QVGen's removable branch, the trainer."""
