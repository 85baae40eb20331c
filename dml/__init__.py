"""Deep metric learning and image retrieval: from labelled folders to a measured, served search.

Importing this package costs nothing: no torch, no faiss. Import what you need from its parts.
"""

__version__ = "0.1.0"
