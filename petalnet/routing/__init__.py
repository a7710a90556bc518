"""Who serves what, and which way to go. Pure: values in, values out, `now` passed in; no I/O, no torch, no trio.

- `records`: what a server announces, its coding and its checks;
- `swarm`: the merged view of all records, and of who failed lately;
- `versions`: which servers hold the same bytes of a model;
- `routes`: the chain of servers through a range of blocks that takes the least time;
- `placement`: which blocks a server should hold, and when it should go to others; `strength` and `settling` are what that rests on.
"""
