"""What every stage uses: names and their checks, random streams, provenance, lazy imports."""
