"""This package chooses the samples and answer tokens that training spends its loss on, and draws random controls."""
