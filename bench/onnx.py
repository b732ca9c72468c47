"""python -m bench.onnx: the measurement in bench/micro/onnx.py."""

from bench.micro.onnx import main

if __name__ == "__main__":
    main()
