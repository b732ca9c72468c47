"""python -m bench.layers: the measurement in bench/micro/layers.py."""

from bench.micro.layers import main

if __name__ == "__main__":
    main()
