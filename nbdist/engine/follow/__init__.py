"""How engines follow the notebook: its cells, search path, folder, variables, torch's settings, edited modules."""
