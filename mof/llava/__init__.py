"""Checkpoints of LLaVA, the released MoF models and Hugging Face LLaVA: `loading` reads and writes them."""
