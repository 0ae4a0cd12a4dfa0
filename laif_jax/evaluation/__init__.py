"""Evaluation: win rates, intervals, lengths, judge agreement, AlpacaEval's formats. NumPy only; no JAX here."""
