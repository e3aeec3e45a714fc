"""Pure-PyTorch formulas of every op: the truth of the tests, the baseline of the benchmarks, the last resort."""
