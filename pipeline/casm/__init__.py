"""CASM: training a mask generator that answers to no single classifier (Zolna, Geras, Cho 2020)."""
