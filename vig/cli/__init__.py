"""The commands `mof vig ...` and `mof train`: one file per command."""
