"""The engine on a GPU. What needs one is in `checks`; the rest runs on any machine.

`python -m tests.gpu` runs the checks with the Python that is there: it needs no pytest.
"""
