"""`mof vig attention` measures how much the answers look at the image."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from encoders.command_groups import starts_over
from encoders.command_options import Images, Limit, Models, Records, TrustRemoteCode, evenly, output_option
from encoders.console import Console
from encoders.runs import write_json
from mof.data.rows import read_records
from vig.analyses.comparison import attention_table
from vig.analyses.image_attention import image_attention
from vig.saved_models import load_model, model_names


@starts_over
def attention(
    model: Models,
    records: Records,
    images: Images,
    limit: Limit = 200,
    output: Annotated[Path | None, output_option("JSON file for the figures.")] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the share of attention that goes from the answers to the image, layer by layer; two models are also compared.

    \b
    Example:
      mof vig attention --model runs/full --model runs/vig --records data/test.json --images data/images --output attention.json
    """
    chosen = evenly(read_records(records), limit)
    shares = {}
    for name, folder in model_names(model).items():
        network, processor = load_model(folder, attn_implementation="eager", trust_remote_code=trust_remote_code)
        shares[name] = image_attention(network, processor, chosen, image_folder=images, progress=True)
    if output is not None:
        write_json(output, {name: asdict(share) for name, share in shares.items()})
    Console().print(attention_table(shares))
