"""Rows and plans, and running a stack of blocks under a plan."""
