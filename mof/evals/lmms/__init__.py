"""Benchmarks that lmms-eval runs: our models as one of its models, and the suites of the two papers. Needs the extra `lmms`."""
