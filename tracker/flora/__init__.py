"""FLORA's API and callbacks: the only package that knows FLORA's field names.

`client` makes the calls, through `caller`, which limits, repeats and judges requests. `parse`,
`technique` and `signature` are pure and need no HTTP library.
"""
