"""`mof serve` puts a saved model behind an OpenAI-compatible server, which transformers brings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers.cli.serve import Serve
from transformers.utils.import_utils import is_serve_available

from encoders.command_options import MODEL_HELP, Device, TrustRemoteCode, usable_device
from encoders.saved_folders import require_config
from mof.auto_classes import register_auto_classes


def serve(
    model: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer OpenAI's clients with a saved image-text-to-text model: images, conversations, streaming.

    The server of transformers (`transformers serve`) loads the model and answers until Ctrl-C, at http://HOST:PORT/v1 and without a key.
    Everybody who reaches it can name any image file of this machine.

    \b
    Example:
      mof serve runs/mof --port 8000
    """
    if not is_serve_available():
        raise ValueError('mof serve needs fastapi, uvicorn and openai: pip install "mof-vig[serve]"')
    require_config(model)
    register_auto_classes()
    Serve(str(model), host=host, port=port, device=usable_device(device), trust_remote_code=trust_remote_code)
