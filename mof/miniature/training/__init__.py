"""This package trains the miniature's networks, for `recipes/train_miniature.py`."""
