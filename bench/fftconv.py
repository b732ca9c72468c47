"""python -m bench.fftconv: the measurement in bench/micro/fftconv.py."""

from bench.micro.fftconv import main

if __name__ == "__main__":
    main()
