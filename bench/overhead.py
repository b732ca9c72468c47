"""python -m bench.overhead: the measurement in bench/micro/overhead.py."""

from bench.micro.overhead import main

if __name__ == "__main__":
    main()
