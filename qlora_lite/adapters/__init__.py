"""What is trained: the layer and method interfaces, attaching, saving, and PEFT files."""
