"""Checkpoints that move: LLaVA, the released MoF models, Hugging Face LLaVA; in and out."""
