"""The sub-commands of mof."""
