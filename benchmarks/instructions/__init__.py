"""Instruction counts of kernels under callgrind: a guard against slow-downs that a busy machine cannot blur.

``python -m benchmarks.instructions`` compares with counts.json and fails where a kernel needs 5 % more than recorded;
``--update`` records what was counted. Counts belong to a compiler; another one has nothing to compare with.
"""
