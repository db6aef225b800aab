"""The core of transfer, of no modality: stages, encoders, heads, features, the training loop."""
