"""Tests of re2fx."""
