"""Measuring what a model does, before and after."""
