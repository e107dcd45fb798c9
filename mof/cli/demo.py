"""`mof demo` opens a local page on which a saved model is asked about images, and its encoders compare two images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from encoders.command_options import MODEL_HELP, DecodingName, Device, MaxNewTokens, TrustRemoteCode, usable_device
from encoders.terminal import say


def demo(
    model: Annotated[Path, typer.Argument(help=MODEL_HELP)],
    encoder: Annotated[
        list[str] | None,
        typer.Option(help="A further encoder that compares two images, beside the model's own; can be given several times."),
    ] = None,
    clip_above: Annotated[float, typer.Option(help="An encoder takes two images for the same above this cosine.")] = 0.95,
    dino_below: Annotated[float, typer.Option(help="An encoder sees two different images below this cosine.")] = 0.6,
    max_new_tokens: MaxNewTokens = 128,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the page, on this machine only. 0: any free port.")] = 0,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    decoding: DecodingName = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Ask a saved image-text-to-text model about images on a local page, and see what its encoders are blind to.

    The page shows how much the image helped each token of an answer, in all and through each encoder, and how much the model attended
    to each encoder's tokens. Its second part compares two images: an encoder that takes different images for the same is blind to
    their difference. Nothing is sent to another machine.

    \b
    Example:
      mof demo runs/mof
    \b
    A stock LLaVA on another machine, beside DINOv2; forward the port (ssh -L 8000:localhost:8000 HOST) and open the printed address:
      mof demo llava-1.5-7b-hf --encoder dinov2-vit-l14 --port 8000 --no-browser
    """
    try:
        import mof.local_server  # noqa: F401  # optional libraries, before the model is loaded
    except ModuleNotFoundError as error:
        raise ValueError(f'mof demo needs {error.name}: pip install "mof-vig[web]"') from error
    from encoders import build_encoder
    from mof.cli.chat import load_saved
    from mof.demo import Demo, DemoServer, own_encoders
    from mof.evals.decoding import load_decoding, load_explainer

    method, explain, place = load_decoding(decoding), load_explainer(), usable_device(device)
    further = {name: build_encoder(name).to(place) for name in encoder or ()}
    if without := [name for name, built in further.items() if built.embed_dim is None]:
        raise ValueError(f"{', '.join(without)} has no embedding of a whole image, by which images are compared; choose another encoder")
    network, processor = load_saved(model, place, trust_remote_code)
    encoders = own_encoders(network, processor) | further
    thresholds = {"clip_above": clip_above, "dino_below": dino_below}
    shown = Demo(network, processor, explain, encoders, **thresholds, method=method, max_new_tokens=max_new_tokens, name=str(model))
    server = DemoServer(shown, port)
    say(f"{server.url} answers for {model}. Stop with Ctrl-C.")
    if browser:
        typer.launch(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        say("stopped")
