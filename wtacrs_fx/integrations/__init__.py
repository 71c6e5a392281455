"""One line for the tools that people train with."""
