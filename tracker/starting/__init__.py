"""Starting runs: starts and the evidence of what they became, batches, and definitions.

`start` begins with a start, `sending` sends it, `recover` and `resolve` end the doubt about it;
`catalogue` has the definitions of techniques. Rows of a `sheet` become the `rows`
of a `plan`; `batches` starts them for a command, `orders` in a worker.
"""
