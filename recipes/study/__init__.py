"""Modules that only recipes need: settings, plans, run folders, rows and tables of a study."""
