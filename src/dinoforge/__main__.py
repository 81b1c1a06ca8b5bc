from dinoforge.cli import run

run()
