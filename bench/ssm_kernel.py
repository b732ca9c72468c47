"""python -m bench.ssm_kernel: the measurement in bench/micro/ssm_kernel.py."""

from bench.micro.ssm_kernel import main

if __name__ == "__main__":
    main()
