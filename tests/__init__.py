"""The suite: core without I/O, the store on both databases, web, worker, whole processes."""
