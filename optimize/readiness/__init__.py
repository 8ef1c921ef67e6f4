"""Whether a model is ready for TensorRT, or for the Triton of a release: what can be told without a GPU."""
