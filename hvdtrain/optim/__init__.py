"""Optimizers, learning-rate schedules, and the gradient noise scale.

An optimizer is a file here: a class of its settings, with a method `build`, and a line in `table.py`. None imports
torch before it builds.
"""
