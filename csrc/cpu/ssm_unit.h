// Sums of exponentials as matrix products. Included inside an instruction set's namespace, after
// vectors.h; see ssm.h for the problem.
//
// With l = columns q + r an output row q is a product of rows: k[q,r] = sum_m left[q,m] right[m,r],
// where m counts real and imaginary parts, right[m,r] holds exp(a r) and left[q,m] holds w exp(a
// columns q). The tables are made in double, by multiplications from exp(a), and rounded once: the
// phase of exp(a l), millions of turns for long rows, keeps its digits. Per output that is 2 modes
// multiply-adds, and for the tables about (columns + length / columns) / length of a few more.

// A product's tile: kTile rows by three vectors of columns. Doubles make tables kTile at a time.
constexpr int kTile = kLanes<double>;
template <class T>
constexpr int kColumns = 3 * kLanes<T>;
constexpr int64_t kTableScalars = 1 << 15;  // of `right`; and half of that, of a block of `left`

// How a problem is cut; blocks of rows are made one after another, each from a fresh exp(a l).
template <class T>
struct Shape {
  int64_t modes, groups;     // groups of kTile modes, the last one padded
  int64_t columns, rows;     // per panel row; rows of the whole kernel
  int64_t block, table_row;  // rows of a block; scalars of one row of a table
  explicit Shape(const SsmProblem& p, bool backward) {
    modes = p.modes;
    groups = (modes + kTile - 1) / kTile;
    table_row = 2 * kTile * groups;
    // Making both tables costs least where they are equal.
    double square = static_cast<double>(p.length);
    if (!backward) square *= static_cast<double>(p.heads);
    int64_t most = kTableScalars / table_row, wanted = kColumns<T>;
    while (wanted + kColumns<T> <= most && static_cast<double>(wanted * wanted) < square)
      wanted += kColumns<T>;
    columns = wanted;
    rows = (p.length + columns - 1) / columns;
    block = kTableScalars / 2 / table_row / kTile * kTile;
    block = block < kTile ? kTile : block;
    const int64_t whole = (rows + kTile - 1) / kTile * kTile;
    block = block > whole ? whole : block;
  }
  int64_t blocks() const { return (rows + block - 1) / block; }
};

struct Phasor {
  double re, im;
};
SEQCONV_INLINE Phasor multiply(Phasor x, Phasor y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
SEQCONV_INLINE Phasor power(Phasor x, int64_t exponent) {
  Phasor y{1, 0};
  for (; exponent; exponent >>= 1, x = multiply(x, x))
    if (exponent & 1) y = multiply(y, x);
  return y;
}
SEQCONV_INLINE Phasor exp_of(const double* a, double times) {
  const double size = exp(a[0] * times), phase = a[1] * times;
  return {size * cos(phase), size * sin(phase)};
}

// kTile complex doubles.
struct Lanes {
  Vec<double> re, im;
};
SEQCONV_INLINE Lanes multiply(const Lanes& x, Phasor y) {
  return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re};
}
// x y^0, x y^1, ...
SEQCONV_INLINE Lanes progression(Phasor x, Phasor y) {
  Lanes out;
  for (int i = 0; i < kTile; ++i, x = multiply(x, y)) {
    out.re[i] = x.re;
    out.im[i] = x.im;
  }
  return out;
}

template <class T>
using Narrow = typename VectorOf<T, kTile / 4>::Unaligned;
template <class T>
SEQCONV_INLINE void store(T* to, const Vec<double>& x) {
  if constexpr (sizeof(T) == sizeof(double))
    *reinterpret_cast<Narrow<T>*>(to) = x;
  else
    *reinterpret_cast<Narrow<T>*>(to) =
        __builtin_convertvector(x, typename VectorOf<T, kTile / 4>::Type);
}

// right[panel][m][kColumns], m = 2 n for the real part of exp(a_n r), 2 n + 1 for the imaginary.
// Notes exp(a columns) on the way.
template <class T>
void make_right(const Shape<T>& s, const double* a, Phasor* rows, T* right) {
  constexpr int kVectors = kColumns<T> / kTile;
  for (int64_t n = 0; n < s.modes; ++n) {
    const Phasor z = exp_of(a + 2 * n, 1);
    rows[n] = power(z, s.columns);
    const Phasor step = power(z, kTile), far = power(step, kVectors);
    Lanes x[kVectors];
    x[0] = progression({1, 0}, z);
    for (int i = 1; i < kVectors; ++i) x[i] = multiply(x[i - 1], step);
    T* to = right + 2 * n * kColumns<T>;
    for (int64_t r = 0; r < s.columns; r += kColumns<T>, to += s.table_row * kColumns<T>) {
      SEQCONV_UNROLL
      for (int i = 0; i < kVectors; ++i) {
        store<T>(to + i * kTile, x[i].re);
        store<T>(to + kColumns<T> + i * kTile, x[i].im);
        x[i] = multiply(x[i], far);
      }
    }
  }
}

// left[tile][m][kTile rows] for rows begin .. begin + count: the real part of w exp(a columns q),
// and minus the imaginary one.
template <class T>
void make_left(const Shape<T>& s, const double* a, const Phasor* rows, const double* w,
               int64_t begin, int64_t count, T* left) {
  for (int64_t n = 0; n < s.modes; ++n) {
    const Phasor row = rows[n], step = power(row, kTile);
    const Phasor first =
        begin ? exp_of(a + 2 * n, static_cast<double>(begin * s.columns)) : Phasor{1, 0};
    Lanes x = progression(multiply({w[2 * n], w[2 * n + 1]}, first), row);
    T* to = left + 2 * n * kTile;
    for (int64_t q = 0; q < count; q += kTile, to += s.table_row * kTile) {
      store<T>(to, x.re);
      store<T>(to + kTile, -x.im);
      x = multiply(x, step);
    }
  }
}

// sum[i][j] (+)= sum_m left[m][i] right[m][j], for kTile by three vectors.
template <class T>
SEQCONV_INLINE void product(const T* left, const T* right, int64_t count, Vec<T> (*sum)[3]) {
  using V = typename VectorOf<T>::Unaligned;
  for (int64_t m = 0; m < count; ++m, left += kTile, right += kColumns<T>) {
    const Vec<T> b[3] = {*reinterpret_cast<const V*>(right),
                         *reinterpret_cast<const V*>(right + kLanes<T>),
                         *reinterpret_cast<const V*>(right + 2 * kLanes<T>)};
    SEQCONV_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const Vec<T> x = splat(left[i]);
      SEQCONV_UNROLL
      for (int j = 0; j < 3; ++j) sum[i][j] += x * b[j];
    }
  }
}

// A tile of the kernel; `to` has room for all of it.
template <class T>
void forward_tile(const T* left, const T* right, int64_t count, T* to, int64_t stride) {
  using V = typename VectorOf<T>::Unaligned;
  Vec<T> sum[kTile][3] = {};
  product<T>(left, right, count, sum);
  SEQCONV_UNROLL
  for (int i = 0; i < kTile; ++i) {
    SEQCONV_UNROLL
    for (int j = 0; j < 3; ++j) *reinterpret_cast<V*>(to + i * stride + j * kLanes<T>) = sum[i][j];
  }
}

template <class T>
size_t ssm_scratch(const SsmProblem& p, bool backward) {
  const Shape<T> s(p, backward);
  const int64_t right = s.table_row * s.columns, left = s.table_row * s.block;
  const int64_t more =
      backward ? 2 * right + left + s.block * kColumns<T> : int64_t{kTile} * kColumns<T>;
  return static_cast<size_t>(right + left + more) * sizeof(T) +
         static_cast<size_t>(p.modes) * sizeof(Phasor) + 256;
}

// Blocks `begin` to `end` of one channel, all heads.
template <class T>
void ssm_forward_unit(const SsmProblem& p, int64_t channel, int64_t begin, int64_t end,
                      char* scratch) {
  const Shape<T> s(p, false);
  Phasor* rows = reinterpret_cast<Phasor*>(scratch);
  T* right = reinterpret_cast<T*>(rows + (s.modes + 3) / 4 * 4);  // whole cache lines
  T* left = right + s.table_row * s.columns;
  T* edge = left + s.table_row * s.block;
  const double* a = p.a + 2 * channel * s.modes;
  make_right(s, a, rows, right);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * s.block;
    const int64_t count = s.rows - first < s.block ? s.rows - first : s.block;
    for (int64_t head = 0; head < p.heads; ++head) {
      const int64_t kernel = head * p.channels + channel;
      make_left(s, a, rows, p.w + 2 * kernel * s.modes, first, count, left);
      T* k = reinterpret_cast<T*>(p.k) + kernel * p.length;
      for (int64_t r = 0; r < s.columns; r += kColumns<T>) {
        const T* panel = right + r * s.table_row;
        for (int64_t q = 0; q < count; q += kTile) {
          const int64_t start = (first + q) * s.columns + r;
          const T* tile = left + q * s.table_row;
          const int64_t last = start + (kTile - 1) * s.columns + kColumns<T>;
          if (last <= p.length) {
            forward_tile<T>(tile, panel, 2 * s.modes, k + start, s.columns);
            continue;
          }
          forward_tile<T>(tile, panel, 2 * s.modes, edge, kColumns<T>);
          for (int i = 0; i < kTile; ++i)
            for (int j = 0; j < kColumns<T>; ++j)
              if (start + i * s.columns + j < p.length)
                k[start + i * s.columns + j] = edge[i * kColumns<T> + j];
        }
      }
    }
  }
}

// left[group][part][q][kTile modes] for the gradient: real and imaginary part of exp(a columns q),
// then the same times q.
template <class T>
void make_left_for_sums(const Shape<T>& s, const double* a, const Phasor* rows, int64_t begin,
                        int64_t count, T* left) {
  for (int64_t group = 0; group < s.groups; ++group) {
    Lanes x{}, step{};
    for (int i = 0; i < kTile && group * kTile + i < s.modes; ++i) {
      const double* mode = a + 2 * (group * kTile + i);
      const Phasor row = rows[group * kTile + i];
      const Phasor first =
          begin ? exp_of(mode, static_cast<double>(begin * s.columns)) : Phasor{1, 0};
      x.re[i] = first.re;
      x.im[i] = first.im;
      step.re[i] = row.re;
      step.im[i] = row.im;
    }
    T* to = left + group * 4 * kTile * s.block;
    for (int64_t q = 0; q < count; ++q, to += kTile) {
      const double number = static_cast<double>(begin + q);
      store<T>(to, x.re);
      store<T>(to + kTile * s.block, x.im);
      store<T>(to + 2 * kTile * s.block, x.re * number);
      store<T>(to + 3 * kTile * s.block, x.im * number);
      x = {x.re * step.re - x.im * step.im, x.re * step.im + x.im * step.re};
    }
  }
}

template <class T>
SEQCONV_INLINE double total(const Vec<T>& x) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(x[i]);
  return sum;
}

// S_0 and S_1 of every head and mode of a channel over blocks `begin` to `end`: four doubles each,
// at sums[head][channel][mode].
template <class T>
void ssm_backward_unit(const SsmProblem& p, int64_t channel, int64_t begin, int64_t end,
                       double* sums, char* scratch) {
  using V = typename VectorOf<T>::Unaligned;
  const Shape<T> s(p, true);
  Phasor* rows = reinterpret_cast<Phasor*>(scratch);
  T* right = reinterpret_cast<T*>(rows + (s.modes + 3) / 4 * 4);  // whole cache lines
  T* left = right + s.table_row * s.columns;
  // panel[r / kColumns][group][part][kTile modes][kColumns]: sums over q of left times dk.
  T* by_column = left + 2 * s.table_row * s.block;
  T* packed = by_column + 2 * s.table_row * s.columns;
  const double* a = p.a + 2 * channel * s.modes;
  make_right(s, a, rows, right);
  // Powers past the end meet zeros, and those of a growing mode may have overflown.
  for (int64_t r = p.length; r < s.columns; ++r)
    for (int64_t m = 0; m < 2 * s.modes; ++m)
      right[(r / kColumns<T> * s.table_row + m) * kColumns<T> + r % kColumns<T>] = 0;
  for (int64_t head = 0; head < p.heads; ++head) {
    const T* dk =
        reinterpret_cast<const T*>(p.dk) + head * p.dk_stride[0] + channel * p.dk_stride[1];
    for (int64_t i = 0; i < 2 * s.table_row * s.columns; ++i) by_column[i] = 0;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * s.block;
      const int64_t count = s.rows - first < s.block ? s.rows - first : s.block;
      if (head == 0 || end - begin > 1) make_left_for_sums(s, a, rows, first, count, left);
      for (int64_t r = 0; r < s.columns; r += kColumns<T>) {
        for (int64_t q = 0; q < count; ++q) {
          const int64_t start = (first + q) * s.columns + r;
          T* to = packed + q * kColumns<T>;
          if (p.dk_stride[2] == 1 && start + kColumns<T> <= p.length) {
            SEQCONV_UNROLL
            for (int j = 0; j < 3; ++j)
              reinterpret_cast<V*>(to)[j] = reinterpret_cast<const V*>(dk + start)[j];
            continue;
          }
          for (int j = 0; j < kColumns<T>; ++j)
            to[j] = start + j < p.length ? dk[(start + j) * p.dk_stride[2]] : T(0);
        }
        T* panel = by_column + 2 * s.table_row * r;
        for (int64_t part = 0; part < 4 * s.groups; ++part) {
          Vec<T> sum[kTile][3] = {};
          product<T>(left + part * kTile * s.block, packed, count, sum);
          V* to = reinterpret_cast<V*>(panel + part * kTile * kColumns<T>);
          SEQCONV_UNROLL
          for (int i = 0; i < kTile; ++i) {
            SEQCONV_UNROLL
            for (int j = 0; j < 3; ++j) to[3 * i + j] += sum[i][j];
          }
        }
      }
    }
    Vec<T> lane;
    for (int i = 0; i < kLanes<T>; ++i) lane[i] = static_cast<T>(i);
    for (int64_t n = 0; n < s.modes; ++n) {
      Vec<T> zero_re = {}, zero_im = {}, one_re = {}, one_im = {};
      for (int64_t r = 0; r < s.columns; r += kLanes<T>) {
        const int64_t panel = r / kColumns<T>, inside = r % kColumns<T>;
        const T* z = right + (panel * s.table_row + 2 * n) * kColumns<T> + inside;
        const T* d = by_column + panel * 2 * s.table_row * kColumns<T> +
                     (n / kTile * 4 * kTile + n % kTile) * kColumns<T> + inside;
        const auto load = [](const T* from) { return *reinterpret_cast<const V*>(from); };
        const Vec<T> re = load(z), im = load(z + kColumns<T>);
        const Vec<T> d0_re = load(d), d0_im = load(d + kTile * kColumns<T>);
        const Vec<T> number = lane + static_cast<T>(r);
        const T columns = static_cast<T>(s.columns);
        const Vec<T> d1_re = load(d + 2 * kTile * kColumns<T>) * columns + number * d0_re;
        const Vec<T> d1_im = load(d + 3 * kTile * kColumns<T>) * columns + number * d0_im;
        zero_re += re * d0_re - im * d0_im;
        zero_im += re * d0_im + im * d0_re;
        one_re += re * d1_re - im * d1_im;
        one_im += re * d1_im + im * d1_re;
      }
      double* to = sums + 4 * ((head * p.channels + channel) * s.modes + n);
      to[0] = total<T>(zero_re);
      to[1] = total<T>(zero_im);
      to[2] = total<T>(one_re);
      to[3] = total<T>(one_im);
    }
  }
}

template <class T>
int64_t ssm_blocks(const SsmProblem& p, bool backward) {
  return Shape<T>(p, backward).blocks();
}

template <class T>
constexpr SsmKernel kSsmKernel = {ssm_blocks<T>, ssm_scratch<T>, ssm_forward_unit<T>,
                                  ssm_backward_unit<T>};
