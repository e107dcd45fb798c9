"""What the paper looks at besides accuracy (arXiv 2602.17186): VIG of other images, attention to images, trust in false text."""
