"""Temporal action localization end to end: which actions a video shows, and from when to when.

A small pipeline to fork: each step is a module of plain functions, from annotations and frames to
detections and their mean average precision, and a backbone that `re2fx` makes reversible so that
it can be trained together with the head on whole videos.
"""
