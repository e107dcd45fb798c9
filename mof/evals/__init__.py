"""mof.evals holds probes and benchmarks (MMVP-VLM, MMVP, POPE, CHAIR), and the models that answer them."""
