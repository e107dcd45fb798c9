"""lmms-eval runs benchmarks with our models, by the suites of the two papers. This needs the extra `lmms`."""
