"""This is the group `mof vig`. Its commands are imported when they are called."""

from encoders.command_groups import command_group

app = command_group(
    {
        "score": "vig.cli.score:score",
        "select": "vig.cli.select:select",
        "report": "vig.cli.report:report",
        "image-match": "vig.cli.image_match:image_match",
        "attention": "vig.cli.attention:attention",
        "misleading": "vig.cli.misleading:misleading",
    },
    help="Visual information gain: score records, select what to train on.",
)
