"""This file lies in every saved folder: it lets the Auto classes of transformers open the folder with `trust_remote_code=True`."""

try:
    from mof.auto_classes import MoFConfig, MoFForConditionalGeneration, MoFImageProcessor, MoFModel, MoFProcessor
except ModuleNotFoundError as error:
    if error.name not in ("mof", "mof.auto_classes"):  # the latter where another package is called mof
        raise
    raise ImportError("this model needs the package mof-vig; install it with: pip install mof-vig") from error

__all__ = ["MoFConfig", "MoFForConditionalGeneration", "MoFImageProcessor", "MoFModel", "MoFProcessor"]
