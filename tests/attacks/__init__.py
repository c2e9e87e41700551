"""Attacks on the promises that take too long for the suite; the suite runs a short form of each."""
