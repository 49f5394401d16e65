"""What calibrated methods learn from: recorded inputs of a model, and the model run on them block by block."""
