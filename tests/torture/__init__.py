"""A campaign that tries to break what the package promises: `python -m torture`, or `make torture`.

Every command runs in a forked child of one process that has loaded all libraries, so that an attempt takes a second or
two. Attempt number n of a promise depends on the seed and n alone.
"""
