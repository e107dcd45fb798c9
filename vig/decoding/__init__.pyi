from .contrasts import ICD, LACING, M3ID, VCD
from .edits import PAI, VAR
from .method import Decoding
from .names import build_decoding

__all__ = ["ICD", "LACING", "M3ID", "PAI", "VAR", "VCD", "Decoding", "build_decoding"]
