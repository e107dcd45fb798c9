"""mof.llava reads and writes checkpoints of LLaVA, the released MoF models and Hugging Face LLaVA. `loading` is its front door."""
