"""The paper's analyses besides accuracy (arXiv 2602.17186): VIG of other images, attention to images, trust in false text."""
