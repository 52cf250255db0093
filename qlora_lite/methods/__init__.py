"""The adapter methods of the literature, one file each, and what several of them share."""
