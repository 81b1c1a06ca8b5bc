"""Python imports this at its start where this folder is on PYTHONPATH: ranks then fail as ``FAULT`` says."""

import os

if "FAULT" in os.environ and "RANK" in os.environ:
    import failing

    failing.arm()
