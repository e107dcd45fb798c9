"""This package repeats the paper's analyses (arXiv 2602.17186): VIG of other images, attention to images, trust in false text."""
