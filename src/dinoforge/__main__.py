import sys

from dinoforge.cli import main

sys.exit(main())
