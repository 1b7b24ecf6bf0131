// Fused window attention on a CPU, forward and backward. swin_mm/ops/attention/reference.py is the definition.
//
// Tokens are read from the projected map in place and results are written in place: padding, shift and windows are index
// arithmetic. Each thread processes one (window, head) at a time, so that scores stay in the core's cache. All
// arithmetic is in float.
//
// Scores are stored with keys as rows and a block of queries as columns, so that the softmax works on whole vectors.
// Names: N tokens per window, d head size, Np and dp those rounded up to whole vectors.

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 6;  // a tile of 6 x 4 vectors fits 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 3;
#else
constexpr int LANES = 4, ROWS = 3;
#endif
constexpr int COLUMNS = 4;              // vectors across a tile
constexpr int BLOCK = COLUMNS * LANES;  // queries at a time
constexpr int ALIGNMENT = 64;

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Stored __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t StoredInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct BFloat16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void assign(float& to, float x) { to = x; }

inline void assign(BFloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
    to.bits = static_cast<uint16_t>(x == x ? rounded : 0x7fc0);
}

inline Vec broadcast(float x) { return Vec{} + x; }
inline Stored& at(float* p) { return *reinterpret_cast<Stored*>(p); }
inline const StoredInts& at(const int32_t* p) { return *reinterpret_cast<const StoredInts*>(p); }
inline const Stored& at(const float* p) { return *reinterpret_cast<const Stored*>(p); }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float sum(Vec x) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

// e^x for x <= 0: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2], relative error 2e-7. Clamped to e^-87 from below; NaN
// propagates.
inline Vec exponential(Vec x) {
    x = x < -87.0f ? broadcast(-87.0f) : x;
    const Vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    Vec p = broadcast(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * (Vec)power;  // reinterprets the bits
}

// C = A B, or C += A B: A any strides, B and C rows of whole vectors.
template <int R, int V>
inline void tile(int depth, const float* A, int ai, int ak, const float* B, int ldb, float* C, int ldc, bool add) {
    Vec c[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) c[r][v] = add ? Vec(at(C + r * ldc + v * LANES)) : Vec{};
    for (int k = 0; k < depth; k++) {
        Vec b[V];
        for (int v = 0; v < V; v++) b[v] = at(B + k * ldb + v * LANES);
        for (int r = 0; r < R; r++) {
            const Vec a = broadcast(A[r * ai + k * ak]);
            for (int v = 0; v < V; v++) c[r][v] += a * b[v];
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) at(C + r * ldc + v * LANES) = c[r][v];
}

template <int V>
inline void strip(int rows, int depth, const float* A, int ai, int ak, const float* B, int ldb, float* C, int ldc,
                  bool add) {
    int i = 0;
    for (; i + ROWS <= rows; i += ROWS) tile<ROWS, V>(depth, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
    if (i + 3 <= rows) {
        tile<3, V>(depth, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
        i += 3;
    }
    for (; i < rows; i++) tile<1, V>(depth, A + i * ai, ai, ak, B, ldb, C + i * ldc, ldc, add);
}

void product(int rows, int columns, int depth, const float* A, int ai, int ak, const float* B, int ldb, float* C,
             int ldc, bool add = false) {
    for (int j = 0; j < columns; j += COLUMNS * LANES) {
        switch (std::min((columns - j) / LANES, COLUMNS)) {
            case 4: strip<4>(rows, depth, A, ai, ak, B + j, ldb, C + j, ldc, add); break;
            case 3: strip<3>(rows, depth, A, ai, ak, B + j, ldb, C + j, ldc, add); break;
            case 2: strip<2>(rows, depth, A, ai, ak, B + j, ldb, C + j, ldc, add); break;
            default: strip<1>(rows, depth, A, ai, ak, B + j, ldb, C + j, ldc, add);
        }
    }
}

inline int round_up(int length) { return (length + LANES - 1) / LANES * LANES; }

// Scratch memory of one thread, aligned to cache lines. Throws std::bad_alloc.
class Scratch {
   public:
    explicit Scratch(size_t floats)
        : memory_(static_cast<float*>(std::aligned_alloc(ALIGNMENT, (floats * 4 / ALIGNMENT + 64) * ALIGNMENT))),
          next_(memory_) {
        if (!memory_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(size_t floats) {
        float* result = next_;
        next_ += (floats * 4 + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT / 4;
        return result;
    }

   private:
    float *memory_, *next_;
};

// The sizes that swin_mm/ops/attention/cpu.py passes, in this order.
struct Shape {
    int64_t batch, H, W, C, heads, Hw, Ww, shift_rows, shift_columns;
};

template <class T>
struct Problem {
    const T *qkv, *pad;
    const float* bias;    // (heads, keys N, queries Np)
    const float* scales;  // (heads,) of cosine attention, or null
    float scale, masked;
    Shape shape;
    int64_t N, d, Np, dp, across, windows;

    Problem(const T* qkv, const T* pad, const float* bias, const float* scales, float scale, float masked, Shape s)
        : qkv(qkv), pad(pad), bias(bias), scales(scales), scale(scale), masked(masked), shape(s) {
        N = s.Hw * s.Ww;
        d = s.C / s.heads;
        Np = round_up(N);
        dp = round_up(d);
        across = (s.W + s.Ww - 1) / s.Ww;
        windows = s.batch * ((s.H + s.Hw - 1) / s.Hw) * across;
    }
};

// Positions of a window's tokens in the map, and the regions that the shift mask separates.
template <class T>
struct Window {
    const Problem<T>& p;
    std::vector<int64_t> token;  // index in the batch of maps, -1 for padding
    std::vector<int32_t> region;
    bool divided;  // the window has several regions

    explicit Window(const Problem<T>& p) : p(p), token(p.N), region(p.Np), divided(false) {}

    void move_to(int64_t number) {
        const Shape& s = p.shape;
        const int64_t per_image = p.windows / s.batch, image = number / per_image;
        const int64_t top = number % per_image / p.across * s.Hw, left = number % p.across * s.Ww;
        const int64_t height = per_image / p.across * s.Hw, width = p.across * s.Ww;
        divided = false;
        for (int64_t i = 0; i < s.Hw; i++) {
            for (int64_t j = 0; j < s.Ww; j++) {
                int64_t row = top + i, column = left + j;  // on the shifted map
                const int64_t t = i * s.Ww + j;
                region[t] = 3 * ((row >= height - s.Hw) + (row >= height - s.shift_rows)) +
                            (column >= width - s.Ww) + (column >= width - s.shift_columns);
                divided |= region[t] != region[0];
                row = row + s.shift_rows < height ? row + s.shift_rows : row + s.shift_rows - height;
                column = column + s.shift_columns < width ? column + s.shift_columns : column + s.shift_columns - width;
                token[t] = row < s.H && column < s.W ? (image * s.H + row) * s.W + column : -1;
            }
        }
    }

    // Load one head of the queries (part 0), keys (1) or values (2) of all tokens, (N, dp).
    void load(int64_t part, int64_t head, float* to) const {
        const int64_t first = part * p.shape.C + head * p.d;
        for (int64_t t = 0; t < p.N; t++) {
            const T* from = (token[t] < 0 ? p.pad : p.qkv + token[t] * 3 * p.shape.C) + first;
            for (int64_t c = 0; c < p.d; c++) to[t * p.dp + c] = to_float(from[c]);
            for (int64_t c = p.d; c < p.dp; c++) to[t * p.dp + c] = 0;
        }
    }

    // The same for a map (B, H, W, C), with zeros for padding.
    void load_map(const T* map, int64_t head, float* to) const {
        for (int64_t t = 0; t < p.N; t++) {
            const T* from = map + token[t] * p.shape.C + head * p.d;
            for (int64_t c = 0; c < p.dp; c++) to[t * p.dp + c] = token[t] < 0 || c >= p.d ? 0 : to_float(from[c]);
        }
    }
};

// (N, dp) -> (d, Np).
template <class T>
void transpose(const Problem<T>& p, const float* from, float* to) {
    for (int64_t t0 = 0; t0 < p.Np; t0 += LANES)
        for (int64_t c = 0; c < p.d; c++) {
            Vec column = {};
            for (int64_t t = t0; t < std::min(t0 + LANES, p.N); t++) column[t - t0] = from[t * p.dp + c];
            at(to + c * p.Np + t0) = column;
        }
}

// Scale each row of (N, dp) to the length `length`; the factors used go to `factors`.
template <class T>
void normalise(const Problem<T>& p, float length, float* rows, float* factors) {
    for (int64_t t = 0; t < p.N; t++) {
        Vec squares = {};
        for (int64_t c = 0; c < p.dp; c += LANES) squares += at(rows + t * p.dp + c) * at(rows + t * p.dp + c);
        factors[t] = length / std::max(std::sqrt(sum(squares)), 1e-12f);
        for (int64_t c = 0; c < p.dp; c += LANES) at(rows + t * p.dp + c) *= factors[t];
    }
}

template <class T>
void scale_rows(const Problem<T>& p, float factor, float* rows) {
    for (int64_t c = 0; c < p.N * p.dp; c += LANES) at(rows + c) *= factor;
}

// Replace the scores of V vectors of queries, starting at `first`, by the numerators of the softmax, and store the
// reciprocals of their sums in `inverse`.
template <int V, class T>
void softmax_numerator(const Window<T>& window, int64_t head, int64_t first, float* scores, float* inverse) {
    const Problem<T>& p = window.p;
    const float* bias = p.bias + head * p.N * p.Np + first;
    Vec row_max[V], row_sum[V] = {};
    for (Vec& x : row_max) x = broadcast(-INFINITY);
    for (int64_t j = 0; j < p.N; j++) {
        for (int v = 0; v < V; v++) {
            float* score = scores + j * BLOCK + v * LANES;
            Vec x = at(score) + at(bias + j * p.Np + v * LANES);
            if (window.divided) {
                const Ints apart = at(&window.region[first + v * LANES]) != window.region[j];
                x = apart ? x + p.masked : x;
            }
            at(score) = x;
            row_max[v] = larger(row_max[v], x);
        }
    }
    for (int64_t j = 0; j < p.N; j++) {
        for (int v = 0; v < V; v++) {
            float* score = scores + j * BLOCK + v * LANES;
            const Vec x = exponential(at(score) - row_max[v]);
            at(score) = x;
            row_sum[v] += x;
        }
    }
    for (int v = 0; v < V; v++) at(inverse + v * LANES) = 1.0f / row_sum[v];
}

template <class T>
void softmax_numerator(const Window<T>& window, int64_t head, int64_t first, float* scores, float* inverse) {
    switch (std::min<int64_t>(BLOCK, window.p.Np - first) / LANES) {
        case 4: return softmax_numerator<4>(window, head, first, scores, inverse);
        case 3: return softmax_numerator<3>(window, head, first, scores, inverse);
        case 2: return softmax_numerator<2>(window, head, first, scores, inverse);
        default: return softmax_numerator<1>(window, head, first, scores, inverse);
    }
}

template <class T>
void forward_items(const Problem<T>& p, int64_t begin, int64_t end, T* out) {
    Scratch scratch(3 * p.N * p.dp + p.d * p.Np + BLOCK * (p.N + p.dp + 1) + p.Np);
    float *q = scratch.take(p.N * p.dp), *k = scratch.take(p.N * p.dp), *v = scratch.take(p.N * p.dp);
    float *q_t = scratch.take(p.d * p.Np), *scores = scratch.take(p.N * BLOCK), *result = scratch.take(BLOCK * p.dp);
    float *factors = scratch.take(p.Np), *inverse = scratch.take(BLOCK);
    Window<T> window(p);
    for (int64_t item = begin; item < end; item++) {
        const int64_t head = item % p.shape.heads;
        if (item == begin || head == 0) window.move_to(item / p.shape.heads);
        window.load(0, head, q);
        window.load(1, head, k);
        window.load(2, head, v);
        if (p.scales) {
            normalise(p, p.scales[head], q, factors);
            normalise(p, 1, k, factors);
        } else {
            scale_rows(p, p.scale, q);
        }
        transpose(p, q, q_t);
        for (int64_t first = 0; first < p.N; first += BLOCK) {
            const int64_t queries = std::min<int64_t>(BLOCK, p.N - first);
            product(p.N, round_up(queries), p.d, k, p.dp, 1, q_t + first, p.Np, scores, BLOCK);
            softmax_numerator(window, head, first, scores, inverse);
            product(queries, p.dp, p.N, scores, 1, BLOCK, v, p.dp, result, p.dp);
            for (int64_t i = 0; i < queries; i++) {
                if (window.token[first + i] < 0) continue;
                T* to = out + window.token[first + i] * p.shape.C + head * p.d;
                for (int64_t c = 0; c < p.d; c++) assign(to[c], result[i * p.dp + c] * inverse[i]);
            }
        }
    }
}

// Backward of `normalise`: replace the gradients of the normalised rows by those of the rows, and return the gradient
// of `length`.
template <class T>
float denormalise(const Problem<T>& p, float length, const float* rows, const float* factors, float* grads) {
    float total = 0;
    for (int64_t t = 0; t < p.N; t++) {
        const float *row = rows + t * p.dp;
        float* grad = grads + t * p.dp;
        Vec along = {};
        for (int64_t c = 0; c < p.dp; c += LANES) along += at(row + c) * at(grad + c);
        const float dot = sum(along) / length;
        total += dot;
        for (int64_t c = 0; c < p.dp; c += LANES)
            at(grad + c) = (at(grad + c) - at(row + c) * (dot / length)) * factors[t];
    }
    return total;
}

// `sums` accumulates over windows, head by head, the gradients of the bias, of padding and of the scale.
template <class T>
void backward_items(const Problem<T>& p, int64_t begin, int64_t end, const T* grad, T* grad_qkv,
                    std::vector<float>& sums) {
    Scratch scratch(7 * p.N * p.dp + 2 * p.d * p.Np + BLOCK * (2 * p.N + 1) + 2 * p.Np);
    float* parts[3] = {scratch.take(p.N * p.dp), scratch.take(p.N * p.dp), scratch.take(p.N * p.dp)};
    float* grads[3] = {scratch.take(p.N * p.dp), scratch.take(p.N * p.dp), scratch.take(p.N * p.dp)};
    float *q_t = scratch.take(p.d * p.Np), *g_t = scratch.take(p.d * p.Np), *g = scratch.take(p.N * p.dp);
    float *weights = scratch.take(p.N * BLOCK), *grad_scores = scratch.take(p.N * BLOCK);
    float *factors[2] = {scratch.take(p.Np), scratch.take(p.Np)}, *inverse = scratch.take(BLOCK);
    Window<T> window(p);
    const int64_t size = p.N * p.Np + 3 * p.d + 1;  // of the bias, of padding, of the scale
    sums.assign(p.shape.heads * size, 0);
    for (int64_t item = begin; item < end; item++) {
        const int64_t head = item % p.shape.heads;
        if (item == begin || head == 0) window.move_to(item / p.shape.heads);
        float* bias_sum = sums.data() + head * size;
        float *pad_sum = bias_sum + p.N * p.Np, *scale_sum = pad_sum + 3 * p.d;
        for (int part = 0; part < 3; part++) window.load(part, head, parts[part]);
        window.load_map(grad, head, g);
        const float length = p.scales ? p.scales[head] : p.scale;
        if (p.scales) {
            normalise(p, length, parts[0], factors[0]);
            normalise(p, 1, parts[1], factors[1]);
        } else {
            scale_rows(p, length, parts[0]);
        }
        transpose(p, parts[0], q_t);
        transpose(p, g, g_t);
        for (int64_t first = 0; first < p.N; first += BLOCK) {
            const int64_t queries = std::min<int64_t>(BLOCK, p.N - first), columns = round_up(queries);
            product(p.N, columns, p.d, parts[1], p.dp, 1, q_t + first, p.Np, weights, BLOCK);
            softmax_numerator(window, head, first, weights, inverse);
            product(p.N, columns, p.d, parts[2], p.dp, 1, g_t + first, p.Np, grad_scores, BLOCK);
            for (int64_t i = 0; i < columns; i += LANES) {
                Vec mean = {};
                for (int64_t j = 0; j < p.N; j++) {
                    at(weights + j * BLOCK + i) *= at(inverse + i);
                    mean += at(weights + j * BLOCK + i) * at(grad_scores + j * BLOCK + i);
                }
                for (int64_t j = 0; j < p.N; j++) {
                    const Vec s = at(weights + j * BLOCK + i) * (at(grad_scores + j * BLOCK + i) - mean);
                    at(grad_scores + j * BLOCK + i) = s;
                    at(bias_sum + j * p.Np + first + i) += s;
                }
            }
            const bool add = first > 0;
            product(queries, p.dp, p.N, grad_scores, 1, BLOCK, parts[1], p.dp, grads[0] + first * p.dp, p.dp);
            product(p.N, p.dp, queries, grad_scores, BLOCK, 1, parts[0] + first * p.dp, p.dp, grads[1], p.dp, add);
            product(p.N, p.dp, queries, weights, BLOCK, 1, g + first * p.dp, p.dp, grads[2], p.dp, add);
        }
        if (p.scales) {
            *scale_sum += denormalise(p, length, parts[0], factors[0], grads[0]);
            denormalise(p, 1, parts[1], factors[1], grads[1]);
        } else {
            scale_rows(p, length, grads[0]);
        }
        for (int part = 0; part < 3; part++) {
            for (int64_t t = 0; t < p.N; t++) {
                const float* from = grads[part] + t * p.dp;
                if (window.token[t] < 0) {
                    for (int64_t c = 0; c < p.d; c++) pad_sum[part * p.d + c] += from[c];
                } else {
                    T* to = grad_qkv + (3 * window.token[t] + part) * p.shape.C + head * p.d;
                    for (int64_t c = 0; c < p.d; c++) assign(to[c], from[c]);
                }
            }
        }
    }
}

// The bias with keys as rows, each padded to whole vectors.
std::vector<float> transposed(const float* bias, const Shape& shape) {
    const int64_t N = shape.Hw * shape.Ww, Np = round_up(N);
    std::vector<float> result(shape.heads * N * Np);
    for (int64_t h = 0; h < shape.heads; h++)
        for (int64_t i = 0; i < N; i++)
            for (int64_t j = 0; j < N; j++) result[(h * N + j) * Np + i] = bias[(h * N + i) * N + j];
    return result;
}

// Call work(begin, end, thread) on each thread's share of the items. Exceptions must not leave a parallel region, so a
// failed allocation in any thread is rethrown after it.
template <class Work>
void parallel_for(int64_t items, const Work& work) {
    std::atomic<bool> out_of_memory{false};
#pragma omp parallel
    {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        const int64_t begin = items * thread / threads, end = items * (thread + 1) / threads;
        try {
            if (begin < end) work(begin, end, thread);
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    }
    if (out_of_memory) throw std::bad_alloc();
}

template <class T>
void forward(const void* qkv, const void* pad, const float* bias, const float* scales, float scale, float masked,
             const Shape& shape, void* out) {
    const Problem<T> p(static_cast<const T*>(qkv), static_cast<const T*>(pad), bias, scales, scale, masked, shape);
    parallel_for(p.windows * shape.heads,
          [&](int64_t begin, int64_t end, int64_t) { forward_items(p, begin, end, static_cast<T*>(out)); });
}

template <class T>
void backward(const void* qkv, const void* pad, const float* bias, const float* scales, float scale, float masked,
              const Shape& shape, const void* grad, void* grad_qkv, float* grad_pad, float* grad_bias,
              float* grad_scales) {
    const Problem<T> p(static_cast<const T*>(qkv), static_cast<const T*>(pad), bias, scales, scale, masked, shape);
    std::vector<std::vector<float>> all(omp_get_max_threads());
    parallel_for(p.windows * shape.heads, [&](int64_t begin, int64_t end, int64_t thread) {
        backward_items(p, begin, end, static_cast<const T*>(grad), static_cast<T*>(grad_qkv), all[thread]);
    });
    for (const auto& sums : all) {  // in a fixed order, so that repeated runs give the same bits
        const float* from = sums.data();
        for (int64_t head = 0; head < shape.heads && from; head++) {
            for (int64_t i = 0; i < p.N; i++)
                for (int64_t j = 0; j < p.N; j++) grad_bias[(head * p.N + i) * p.N + j] += from[j * p.Np + i];
            from += p.N * p.Np;
            for (int part = 0; part < 3; part++)
                for (int64_t c = 0; c < p.d; c++) grad_pad[part * shape.C + head * p.d + c] += *from++;
            grad_scales[head] += *from++;
        }
    }
}

}  // namespace

// Types: 0 float, 1 bfloat16. Gradients of pad, bias and scales are added to what the buffers hold.
// Both functions return 0, or 1 if memory could not be allocated.

extern "C" int swin_mm_attention(int type, const void* qkv, const void* pad, const float* bias, const float* scales,
                                  float scale, float masked, const int64_t* sizes, void* out) {
    Shape shape;
    std::memcpy(&shape, sizes, sizeof shape);
    try {
        const auto by_key = transposed(bias, shape);
        (type ? forward<BFloat16> : forward<float>)(qkv, pad, by_key.data(), scales, scale, masked, shape, out);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}

extern "C" int swin_mm_attention_backward(int type, const void* qkv, const void* pad, const float* bias,
                                           const float* scales, float scale, float masked, const int64_t* sizes,
                                           const void* grad, void* grad_qkv, float* grad_pad, float* grad_bias,
                                           float* grad_scales) {
    Shape shape;
    std::memcpy(&shape, sizes, sizeof shape);
    try {
        const auto by_key = transposed(bias, shape);
        (type ? backward<BFloat16> : backward<float>)(qkv, pad, by_key.data(), scales, scale, masked, shape, grad,
                                                      grad_qkv, grad_pad, grad_bias, grad_scales);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    return 0;
}
