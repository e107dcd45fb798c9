"""These modules are for recipes only: settings, plans, run folders, rows and tables of a study."""
