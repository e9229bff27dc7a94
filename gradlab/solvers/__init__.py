"""Solvers: the moments of a gradient, by enumeration, dynamic programming, quadrature or sampling."""
