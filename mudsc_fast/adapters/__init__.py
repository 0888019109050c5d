"""Calling conventions of other merging tools, on the kernels and the matching of this package; one file a tool.

Each is imported by its name, such as ``from mudsc_fast.adapters import rebasin``, and needs its tool only when used.
"""
