"""Joules that can be stood behind: counters, interpolated windows, validity and the meter's certificate."""
