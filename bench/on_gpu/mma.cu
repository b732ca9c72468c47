// How many cycles lie between two mma.sync of one scheduler, and how fast the clock runs meanwhile. Every warp has
// eight products under way that do not wait for each other. For NVRTC, which includes nothing.
struct Numbers {
  long long* times;  // of every warp: first and last cycle, first and last nanosecond
  long long iterations;
};

__device__ long long nanoseconds() {
  long long t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}

__device__ void multiply(unsigned (&d)[2], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ void multiply(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <class T, int words>
__device__ void run(const Numbers& n) {
  T sums[8][words] = {};
  const unsigned lane = threadIdx.x % 32, one = 0x2c002c00u + lane;  // pairs of about 1 / 16
  const unsigned a[4] = {one, one + 1, one + 2, one + 3}, b[2] = {one + 4, one + 5};
  __syncthreads();
  const long long start_ns = nanoseconds(), start = clock64();
  for (long long i = 0; i < n.iterations; ++i) {
#pragma unroll
    for (int j = 0; j < 8; ++j) multiply(sums[j], a, b);
  }
  const long long end = clock64(), end_ns = nanoseconds();
  if (lane == 0) {
    const long long warp = (blockIdx.x * (long long)blockDim.x + threadIdx.x) / 32;
    long long* times = n.times + 4 * warp;
    times[0] = start, times[1] = end, times[2] = start_ns, times[3] = end_ns;
  }
}

extern "C" __global__ void __launch_bounds__(512) mma_f16(const Numbers n) { run<unsigned, 2>(n); }
extern "C" __global__ void __launch_bounds__(512) mma_f32(const Numbers n) { run<float, 4>(n); }
