"""The samples and answer tokens that training spends its loss on, and the random controls."""
