"""``dinoforge selfcheck``: whether all of it is right on this machine, in lines to paste into a bug report."""
