// Operations between matrix products, float32, each in one pass over memory. native.py compiles and calls them; what
// they compute is defined by torch's operations in model/elementwise.py, model/fused_decoder.py and
// generator/kv_cache.py, with which tests compare them.
//
// Rows lie `stride` floats apart; their elements are contiguous. NaN and infinity reach the result, as in torch.
// `threads` share the rows where there are enough of them, each a run of its own, so sums are the same every time.

#include <stdint.h>
#include <stdlib.h>
#include <time.h>
#ifdef __AVX__
#include <immintrin.h>
#endif

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64), aligned(4), may_alias));
#define WIDTH 16
#define BLOCK 32 // places of a block of the cache: generator/kv_blocks.py
#define MOST 16384 // elements of a row whose gradient is summed here: native.py

#define HERE static inline __attribute__((always_inline))

#define ENOUGH 65536 // elements from which on several threads share them
#define PRAGMA(words) _Pragma(#words)
#define SHARED_ROWS(elements)                                                                                           \
    PRAGMA(omp parallel for num_threads(threads) schedule(static) if (threads > 1 && (elements) >= ENOUGH))

static inline vec load(const float *from) { return *(const vec *)from; }
static inline void store(float *to, vec value) { *(vec *)to = value; }
static inline vec all(float v) { return (vec){v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }

static inline vec choose(ivec where, vec yes, vec no) {
    return (vec)((where & (ivec)yes) | (~where & (ivec)no));
}

#ifdef __AVX512F__
// the second one where either is not a number
static inline vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
static inline vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
static inline vec larger(vec a, vec b) { return choose(a > b, a, b); }
static inline vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif

// Halves are put together, so that a compiler needs few instructions.
typedef float vec8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef union {
    vec whole;
    vec8 halves[2];
    vec4 quarters[4];
} Parts;

static inline float sum_of(vec v) {
    Parts p = {v};
    p.halves[0] += p.halves[1];
    vec4 q = p.quarters[0] + p.quarters[1];
    return q[0] + q[2] + (q[1] + q[3]);
}

static inline float peak_of(vec v) { // of numbers; NaN may be lost
    Parts p = {v};
    vec4 q = p.quarters[0], others[] = {p.quarters[1], p.quarters[2], p.quarters[3]};
    for (int i = 0; i < 3; i++) {
        vec4 more = others[i];
        typedef int32_t ivec4 __attribute__((vector_size(16), may_alias));
        ivec4 larger = more > q;
        q = (vec4)((larger & (ivec4)more) | (~larger & (ivec4)q));
    }
    float a = q[0] > q[1] ? q[0] : q[1], b = q[2] > q[3] ? q[2] : q[3];
    return a > b ? a : b;
}

// e^x where it is a normal number
static inline vec exponential_within(vec x) {
    vec magic = all(12582912.0f);
    vec shifted = x * 1.44269504089f + magic;
    vec n = shifted - magic;
    vec r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    ivec power = ((ivec)shifted - 0x4B400000 + 127) << 23;
    return p * (vec)power; // a product: the sum of the bits would lose NaN
}

// e^x; below -87 the smallest normal number instead of less
static inline vec exponential(vec x) { return exponential_within(smaller(all(88.0f), larger(all(-87.0f), x))); }

// 1 / (1 + e^-x)
static inline vec sigmoid(vec x) {
    vec d = 1.0f + exponential(-x);
#ifdef __AVX512F__
    vec about = (vec)_mm512_rcp14_ps((__m512)d); // one step of Newton's method makes its 14 bits 28
    return about * (2.0f - d * about);
#else
    return 1.0f / d;
#endif
}

static inline float root(float x) { return __builtin_sqrtf(x); }

static inline float square_sum(const float *x, long n) {
    vec a = {}, b = {};
    long i = 0;
    for (; i + 2 * WIDTH <= n; i += 2 * WIDTH) {
        vec u = load(x + i), v = load(x + i + WIDTH);
        a += u * u;
        b += v * v;
    }
    float rest = 0;
    for (; i < n; i++) rest += x[i] * x[i];
    return sum_of(a + b) + rest;
}

// ---------------------------------------------------------------- norms

// to = x * s * weight, a row; `to` may be x
static inline void scaled(const float *x, const float *weight, float s, float *to, long n) {
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(to + i, load(x + i) * s * load(weight + i));
    for (; i < n; i++) to[i] = x[i] * s * weight[i];
}

// out = x / rms(x) * weight; scale [rows] = 1 / rms(x) unless it is null
void rms_norm(const float *x, long x_stride, const float *weight, float eps, float *out, long out_stride, float *scale,
              long rows, long n, int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++) {
        const float *from = x + row * x_stride;
        float *to = out + row * out_stride;
        float s = 1.0f / root(square_sum(from, n) / n + eps);
        if (scale) scale[row] = s;
        scaled(from, weight, s, to, n);
    }
}

// One row: of_x = s (g w - x s^2 mean(g w x)) + more, and of_weight += g x s; more and of_weight may be null, of_x g.
static inline void norm_backward(const float *g, const float *x, const float *w, float s, const float *more,
                                 float *of_x, float *of_weight, long n) {
    vec total = {};
    long i = 0;
    for (; i + WIDTH <= n; i += WIDTH) total += load(g + i) * load(w + i) * load(x + i);
    float rest = 0;
    for (; i < n; i++) rest += g[i] * w[i] * x[i];
    float pull = (sum_of(total) + rest) * s * s / n;
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        vec one = load(g + i), at = load(x + i), slope = s * (one * load(w + i) - at * pull);
        if (of_weight) store(of_weight + i, load(of_weight + i) + one * at * s);
        if (more) slope += load(more + i);
        store(of_x + i, slope);
    }
    for (; i < n; i++) {
        float one = g[i], at = x[i];
        if (of_weight) of_weight[i] += one * at * s;
        of_x[i] = s * (one * w[i] - at * pull) + (more ? more[i] : 0);
    }
}

static inline void flush(float *part, float *total, long n) {
    for (long i = 0; i < n; i++) {
        total[i] += part[i];
        part[i] = 0;
    }
}

#define TOGETHER 64 // rows summed by themselves: rounding grows with them and with their number, not with the product

// The gradients of the inputs of rows begin <= row < end; that of the weight is added to of_weight [n] unless null.
static void norms_backward(const float *g, long g_stride, const float *x, long x_stride, const float *weight,
                           const float *scale, const float *more, long more_stride, float *of_x, long of_stride,
                           float *of_weight, long begin, long end, long n) {
    float part[MOST];
    if (of_weight)
        for (long i = 0; i < n; i++) part[i] = 0;
    for (long row = begin; row < end; row++) {
        norm_backward(g + row * g_stride, x + row * x_stride, weight, scale[row], more ? more + row * more_stride : 0,
                      of_x + row * of_stride, of_weight ? part : 0, n);
        if (of_weight && ((row - begin) % TOGETHER == TOGETHER - 1 || row == end - 1)) flush(part, of_weight, n);
    }
}

// of_weight: null, or [runs, n] to which the sums of each of `runs` of rows are added. more: null, or added to of_x.
static void norm_rows_backward(const float *g, long g_stride, const float *x, long x_stride, const float *weight,
                               const float *scale, const float *more, long more_stride, float *of_x, long of_stride,
                               float *of_weight, long rows, long n, long runs, int threads) {
    long each = (rows + runs - 1) / runs;
    SHARED_ROWS(rows * n)
    for (long run = 0; run < runs; run++) {
        long end = (run + 1) * each < rows ? (run + 1) * each : rows;
        norms_backward(g, g_stride, x, x_stride, weight, scale, more, more_stride, of_x, of_stride,
                       of_weight ? of_weight + run * n : 0, run * each, end, n);
    }
}

void rms_norm_backward(const float *g, long g_stride, const float *x, long x_stride, const float *weight,
                       const float *scale, float *of_x, long of_stride, float *of_weight, long rows, long n, long runs,
                       int threads) {
    norm_rows_backward(g, g_stride, x, x_stride, weight, scale, 0, 0, of_x, of_stride, of_weight, rows, n, runs,
                       threads);
}

// ---------------------------------------------------------------- heads: norm, then rotation

// One head, [size] each. by: scale and weight of its norm, w null: none.
HERE void turn_head(const float *x, float by, const float *w, const float *c, const float *s, float *to, long size) {
    long half = size / 2, i = 0;
    for (; i + WIDTH <= half; i += WIDTH) {
        vec a = load(x + i), b = load(x + i + half);
        if (w) a = a * by * load(w + i), b = b * by * load(w + i + half);
        store(to + i, a * load(c + i) + b * load(s + i));
        store(to + i + half, b * load(c + i + half) + a * load(s + i + half));
    }
    for (; i < half; i++) {
        float a = x[i], b = x[i + half];
        if (w) a = a * by * w[i], b = b * by * w[i + half];
        to[i] = a * c[i] + b * s[i];
        to[i + half] = b * c[i + half] + a * s[i + half];
    }
}

// The gradient of one head turned back
HERE void turn_head_back(const float *g, const float *c, const float *s, float *to, long size) {
    long half = size / 2, i = 0;
    for (; i + WIDTH <= half; i += WIDTH) {
        vec a = load(g + i), b = load(g + i + half);
        store(to + i, a * load(c + i) + b * load(s + i + half));
        store(to + i + half, b * load(c + i + half) + a * load(s + i));
    }
    for (; i < half; i++) {
        float a = g[i], b = g[i + half];
        to[i] = a * c[i] + b * s[i + half];
        to[i + half] = b * c[i + half] + a * s[i];
    }
}

// x [tokens, heads, size] -> out; weight null: no norm. heads from `kind` on have the second weight (engine: keys).
// cos, sin: of token t at `position[t]` rows of `turn` floats (position null: t); sin is negative in its first half.
void turn_heads(const float *x, long x_stride, const float *weight, const float *second, long kind, float eps,
                const float *cos, const float *sin, long turn, const int64_t *position, float *out, long out_stride,
                long tokens, long heads, long size, int threads) {
    SHARED_ROWS(tokens * heads * size)
    for (long t = 0; t < tokens; t++) {
        long at = (position ? position[t] : t) * turn;
        for (long h = 0; h < heads; h++) {
            const float *from = x + t * x_stride + h * size, *w = h < kind ? weight : second;
            float *to = out + t * out_stride + h * size, by = w ? 1.0f / root(square_sum(from, size) / size + eps) : 1;
            if (size == 32) turn_head(from, by, w, cos + at, sin + at, to, 32);
            else turn_head(from, by, w, cos + at, sin + at, to, size);
        }
    }
}

// The inverse rotation: the gradient of the rotated heads g -> of_x.
void turn_heads_back(const float *g, long g_stride, const float *cos, const float *sin, float *of_x, long of_stride,
                     long tokens, long heads, long size, int threads) {
    SHARED_ROWS(tokens * heads * size)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++)
            turn_head_back(g + t * g_stride + h * size, cos + t * size, sin + t * size, of_x + t * of_stride + h * size,
                           size);
}

// ---------------------------------------------------------------- silu(gate) * up

void swiglu(const float *gate, long gate_stride, const float *up, long up_stride, float *out, long out_stride, long rows,
            long n, int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++) {
        const float *a = gate + row * gate_stride, *b = up + row * up_stride;
        float *to = out + row * out_stride;
        long i = 0;
        for (; i + WIDTH <= n; i += WIDTH) {
            vec x = load(a + i);
            store(to + i, x * sigmoid(x) * load(b + i));
        }
        for (; i < n; i++) {
            vec x = all(a[i]);
            to[i] = (x * sigmoid(x))[0] * b[i];
        }
    }
}

static inline void swiglu_slope(vec g, vec x, vec up, vec *of_gate, vec *of_up) {
    vec s = sigmoid(x);
    *of_up = g * x * s;
    *of_gate = g * up * s * (1.0f + x * (1.0f - s));
}

void swiglu_backward(const float *g, long g_stride, const float *gate, long gate_stride, const float *up,
                     long up_stride, float *of_gate, float *of_up, long of_stride, long rows, long n,
                     int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++) {
        const float *a = g + row * g_stride, *b = gate + row * gate_stride, *c = up + row * up_stride;
        float *p = of_gate + row * of_stride, *q = of_up + row * of_stride;
        vec first, second;
        long i = 0;
        for (; i + WIDTH <= n; i += WIDTH) {
            swiglu_slope(load(a + i), load(b + i), load(c + i), &first, &second);
            store(p + i, first);
            store(q + i, second);
        }
        for (; i < n; i++) {
            swiglu_slope(all(a[i]), all(b[i]), all(c[i]), &first, &second);
            p[i] = first[0];
            q[i] = second[0];
        }
    }
}

// ---------------------------------------------------------------- a matrix turned, bit by bit

// `to` [columns, rows], its rows `stride` floats apart, becomes the transpose of `from` [rows, columns]. Where the
// processor has AVX, 16 rows at a time make whole lines, which are written past the caches: nobody reads them soon, and
// what was there before is not fetched.
#define TILE_ROWS 32
#define TILE_COLUMNS 64

#ifdef __AVX__
static inline void turn_eight(const float *from, long columns, __m256 *s) {
    __m256 r[8];
    for (int i = 0; i < 8; i++)
        r[i] = _mm256_loadu_ps(from + i * columns);
    for (int i = 0; i < 8; i += 2) {
        s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
    }
    for (int i = 0; i < 4; i++) {
        s[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        s[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
}

static inline void turn_lines(const float *from, long columns, float *to, long stride, int past) {
    __m256 first[8], second[8];
    turn_eight(from, columns, first);
    turn_eight(from + 8 * columns, columns, second);
    for (int i = 0; i < 8; i++, to += stride) {
        if (past) {
            _mm256_stream_ps(to, first[i]);
            _mm256_stream_ps(to + 8, second[i]);
        } else {
            _mm256_storeu_ps(to, first[i]);
            _mm256_storeu_ps(to + 8, second[i]);
        }
    }
}
#endif

static void turn_tile(const uint32_t *from, long columns, uint32_t *to, long stride, long rows, long width) {
    long whole_rows = 0, whole_width = 0;
#ifdef __AVX__
    whole_rows = rows & ~15, whole_width = width & ~7;
    int past = ((uintptr_t)to | (uintptr_t)stride * sizeof(float)) % 32 == 0;
    for (long c = 0; c < whole_width; c += 8)
        for (long r = 0; r < whole_rows; r += 16)
            turn_lines((const float *)from + r * columns + c, columns, (float *)to + c * stride + r, stride, past);
#endif
    for (long c = 0; c < width; c++)
        for (long r = c < whole_width ? whole_rows : 0; r < rows; r++)
            to[c * stride + r] = from[r * columns + c];
}

void turn_matrix(const uint32_t *from, long rows, long columns, uint32_t *to, long stride, int threads) {
    SHARED_ROWS(rows *columns)
    for (long first = 0; first < rows; first += TILE_ROWS) {
        long height = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
        for (long c = 0; c < columns; c += TILE_COLUMNS) {
            long width = columns - c < TILE_COLUMNS ? columns - c : TILE_COLUMNS;
            turn_tile(from + first * columns + c, columns, to + c * stride + first, stride, height, width);
        }
#ifdef __AVX__
        _mm_sfence();
#endif
    }
}

#include "tree.c"
#include "layers.c"
#include "stack.c"
#include "decode.c"
