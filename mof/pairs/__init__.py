"""mof.pairs searches blind pairs (`search`), shows them on a page (`gallery`), and lets people describe them (`annotation`)."""
