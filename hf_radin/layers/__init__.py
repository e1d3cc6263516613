"""The last layers of a soup that an ensemble taught, a head or a tail, and how they are made again."""
