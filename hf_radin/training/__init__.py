"""Soups at the end of a training: the callback, what it collects, what it checks before."""
