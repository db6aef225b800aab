"""Task adapters: what the training loop needs to know of a task, and nothing more."""
