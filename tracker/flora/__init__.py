"""FLORA's API and callbacks: the only package that knows FLORA's field names.

`client` makes the calls, through `caller`, which limits, repeats and judges requests. `parse` and
`callback` are pure and need no HTTP library.
"""
