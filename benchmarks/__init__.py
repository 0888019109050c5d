"""The benchmark suite: one module a kernel, each row checked against the float64 reference before it is timed."""
