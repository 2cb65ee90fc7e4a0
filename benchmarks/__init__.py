"""How fast ckavg is, beside the loop that anyone would write and beside plain reading: `python -m benchmarks`.

Whole commands are measured, each in a process of its own. `__main__` and what it imports must not import torch: see
`benchmarks.measure`. Nothing here is a test of pytest's.
"""
