"""encoders.images finds images in folders, lists and tars, reads and decodes them, and resizes them to pixels."""
