"""These modules hold the commands `mof vig ...` and `mof train`, one file per command."""
