"""What outlives a process: a journal of all that happened, and checkpoints that begin it anew.

Nothing here has a thread, a socket or a clock; every file is touched through `distgrad.durable.disk`, so that tests
can put a disk in its place that tears, forgets and fills up.
"""
