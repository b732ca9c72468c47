"""python -m bench.generate: the command in bench/language/command.py."""

from bench.language.command import main

if __name__ == "__main__":
    main()
