"""The commands of the program: a module each, with `add_arguments` and `run`."""
