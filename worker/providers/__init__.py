"""Vendors: the one-method contract, and one file for each wire dialect."""
