"""Annotation of blind pairs: a local page on which a person describes them, and the export as a benchmark."""
