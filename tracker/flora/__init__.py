"""FLORA itself: its API, its callbacks' signature and its field names.

`signature` and `parse` are pure and need no HTTP library; `client` speaks to the API, through
`caller`, which holds the request `budget`, the `breaker`, the `contact` and the rules of repeating.
"""
