"""python -m bench.streaming: the measurement in bench/micro/streaming.py."""

from bench.micro.streaming import main

if __name__ == "__main__":
    main()
