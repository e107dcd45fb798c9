"""Which samples and which answer tokens training spends its loss on, and the random controls."""
