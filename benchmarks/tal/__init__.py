"""End-to-end temporal action localization: untrimmed videos in, actions with their times out.

A small pipeline to read and to fork: annotations, decoding, datasets, and videos of moving digits
to try it all on without a download.
"""
