"""The libraries that build encoders: open_clip, timm, transformers, torch.hub. Imported by the registry, each when it is asked for."""
