"""What a machine with a GPU is asked: build, tests, sanitizers, tuning, benchmarks. `make gpu` runs it."""
