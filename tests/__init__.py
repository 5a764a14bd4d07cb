"""Tests by subject; test_all.py in the folder above runs them, after the method's own."""
