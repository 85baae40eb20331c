"""How fast, against whom: one file per table, and the race, the memory and the page they share."""
