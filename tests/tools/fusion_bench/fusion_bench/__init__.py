"""What docs/adapters.md needs of fusion_bench, for where it is not installed."""
