"""What the recipes need around a training: settings, plans, run folders, tables."""
