"""Evaluation: what a model does before and after training."""
