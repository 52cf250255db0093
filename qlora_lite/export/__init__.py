"""Write weights that every other tool loads, and prove that they are the trained ones."""
