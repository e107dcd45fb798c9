"""The training of the miniature's networks, which `recipes/train_miniature.py` runs."""
