"""python -m bench.parallel: the measurement in bench/micro/parallel.py."""

from bench.micro.parallel import main

if __name__ == "__main__":
    main()
