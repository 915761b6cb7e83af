"""CASM: training of a mask generator that does not depend on a single classifier (Zolna, Geras, Cho 2020)."""
