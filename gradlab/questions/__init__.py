"""Questions: one module for each, functions of scenarios that return frames."""
