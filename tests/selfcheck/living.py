"""Which processes there are, for tests that nothing is left of some."""

from pathlib import Path


def living(word: str) -> list[str]:
    """Command lines that hold a word."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in text:
            found.append(text)
    return found
