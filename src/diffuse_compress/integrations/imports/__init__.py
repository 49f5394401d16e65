"""Other people's quantized layers, read onto ours with their codes as they are; one module for each source."""
