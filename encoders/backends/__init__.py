"""Each backend builds encoders with a library: open_clip, timm, transformers, torch.hub. The registry imports a backend on first use."""
