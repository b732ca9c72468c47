// What follows the convolution and its gradient, kChunk values at a time. Part of fftconv_unit.h.

// y = post_gate * activation(v)
template <class T>
struct Epilogue {
  Activation activation;
  Series post_gate, y;

  static void take(const void* context, int64_t t, int64_t n, T* v) {
    const Epilogue& e = *static_cast<const Epilogue*>(context);
    Vec<T> slope;
    if (e.activation != Activation::kNone)
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        Vec<T>& at = *reinterpret_cast<Vec<T>*>(v + i);
        at = activate<T>(e.activation, at, slope);
      }
    if (!e.post_gate) return write(e.y, t, n, v);
    T gate[kChunk];
    write_product(e.y, t, n, v, read_window(e.post_gate, t, n, gate));
  }
};

// dv = dy * post_gate * activation'(v), dpost_gate = dy * activation(v)
template <class T>
struct EpilogueGradient {
  Activation activation;
  Series post_gate, dy, dpost_gate;
  T* dv;

  static void take(const void* context, int64_t t, int64_t n, T* v) {
    const EpilogueGradient& e = *static_cast<const EpilogueGradient*>(context);
    alignas(64) T slopes[kChunk], staging[2][kChunk];
    const T* grad = read_window(e.dy, t, n, staging[0]);
    const bool active = e.activation != Activation::kNone;
    for (int64_t i = 0; active && i < n; i += kLanes<T>) {
      Vec<T>& at = *reinterpret_cast<Vec<T>*>(v + i);
      at = activate<T>(e.activation, at, *reinterpret_cast<Vec<T>*>(slopes + i));
    }
    if (e.dpost_gate) write_product(e.dpost_gate, t, n, grad, v);
    if (active) {
      multiply(grad, slopes, n, e.dv + t);
      grad = e.dv + t;
    }
    if (e.post_gate)
      multiply(grad, read_window(e.post_gate, t, n, staging[1]), n, e.dv + t);
    else if (!active)
      copy(grad, n, e.dv + t);
  }
};

// du = dx * pre_gate, dpre_gate = dx * u
template <class T>
struct InputGradient {
  Series u, pre_gate, du, dpre;
  bool gated() const { return dpre || pre_gate; }

  static void take(const void* context, int64_t t, int64_t n, T* dx) {
    const InputGradient& e = *static_cast<const InputGradient*>(context);
    T staging[kChunk];
    if (e.dpre) write_product(e.dpre, t, n, dx, read_window(e.u, t, n, staging));
    if (!e.du) return;
    if (e.pre_gate)
      write_product(e.du, t, n, dx, read_window(e.pre_gate, t, n, staging));
    else
      write(e.du, t, n, dx);
  }
};
