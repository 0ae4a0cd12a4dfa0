"""Compiling a study's steps before paying for the machines: memory, work and cost of each, per chip."""
