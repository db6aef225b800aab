"""A transfer from source to run folder, its evaluation, and what is reported of it."""

from mmtransfer.runs.training import evaluate, set_up, train

__all__ = ["evaluate", "set_up", "train"]
