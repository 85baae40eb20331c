"""The REST service: HTTP in front of collections. It needs no torch."""
