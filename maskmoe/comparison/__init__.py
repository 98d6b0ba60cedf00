"""Comparisons: a suite becomes runs, runs become lines of one table, the table becomes a page."""
