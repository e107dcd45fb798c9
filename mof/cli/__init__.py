"""These modules hold the sub-commands of mof."""
