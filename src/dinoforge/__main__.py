from dinoforge.cli.main import run

run()
