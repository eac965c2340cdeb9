"""The rewriting passes, one verb a file; installed and imported as ``re2fx.passes``."""

if __name__ != "re2fx.passes":
    raise ImportError(
        "import the passes as re2fx.passes: a second copy would load everything twice"
    )
