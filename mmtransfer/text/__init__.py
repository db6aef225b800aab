"""Text: examples, classifiers, predictions and the task."""
