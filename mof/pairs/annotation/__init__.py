"""A person describes blind pairs on a local page, and the descriptions are exported as a benchmark."""
