"""How fast ckavg is, compared with the obvious loop and with plain reading: `python -m benchmarks`.

Whole commands are measured, each in its own process. `__main__` and its imports must not import torch: see
`benchmarks.measure`. Nothing here is a pytest test.
"""
