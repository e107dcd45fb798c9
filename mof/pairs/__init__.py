"""Blind pairs: the search (`mof.pairs.search`), the page that shows them (`gallery`), and their annotation (`annotation`)."""
