"""How the miniature's networks were trained; `recipes/train_miniature.py` does it again."""
