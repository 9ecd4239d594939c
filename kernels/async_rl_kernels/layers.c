// The parts of a decoder's layer before and after its attention, forward and backward, float32: what a block of rows
// passes through, products included, while it lies in the processor's cache. Products are MKL's `sgemm`, which torch
// brings along and model/compiled_layer.py hands over. native.c includes this file.
//
// Matrices are row by row; a weight is [out, in].

typedef void (*Gemm)(const char *, const char *, const int *, const int *, const int *, const float *, const float *,
                     const int *, const float *, const int *, const float *, float *, const int *);

static void gemm(void *function, const char *left, const char *right, long rows, long columns, long depth, const float *a,
                 long a_stride, const float *b, long b_stride, float keep, float *to, long stride) {
    // column by column, as `sgemm` counts, this is the transpose: the second matrix comes first
    int m = columns, n = rows, k = depth, lda = b_stride, ldb = a_stride, ldc = stride;
    float one = 1.0f;
    ((Gemm)function)(right, left, &m, &n, &k, &one, b, &lda, a, &ldb, &keep, to, &ldc);
}

// to [rows, columns] = keep * to + a [rows, depth] b [columns, depth]^T
#define BY_WEIGHT(rows, columns, depth, a, a_stride, b, keep, to, stride)                                               \
    gemm(l->gemm, "N", "T", rows, columns, depth, a, a_stride, b, depth, keep, to, stride)
// to [rows, columns] = keep * to + a [rows, depth] b [depth, columns]
#define THROUGH_WEIGHT(rows, columns, depth, a, a_stride, b, keep, to, stride)                                          \
    gemm(l->gemm, "N", "N", rows, columns, depth, a, a_stride, b, columns, keep, to, stride)
// to [rows, columns] = keep * to + a [depth, rows]^T b [depth, columns]
#define OF_WEIGHT(rows, columns, depth, a, a_stride, b, b_stride, keep, to)                                             \
    if (to) gemm(l->gemm, "T", "N", rows, columns, depth, a, a_stride, b, b_stride, keep, to, columns)

static void copy_rows(const float *from, long from_stride, float *to, long stride, long rows, long n, int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++)
        for (long i = 0; i < n; i++) to[row * stride + i] = from[row * from_stride + i];
}

// out = x * scale * weight, as rms_norm had it
static void norm_again(const float *x, long x_stride, const float *weight, const float *scale, float *out, long rows,
                       long n, int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++)
        scaled(x + row * x_stride, weight, scale[row], out + row * n, n);
}

// sum += x, and its norm as rms_norm has it -> out; the sum also to copy
static void add_and_norm(float *sum, const float *x, long x_stride, const float *weight, float eps, float *out,
                         float *scale, float *copy, long rows, long n, int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++) {
        float *to = sum + row * n;
        const float *more = x + row * x_stride;
        for (long i = 0; i < n; i++) to[i] += more[i];
        scale[row] = 1.0f / root(square_sum(to, n) / n + eps);
        scaled(to, weight, scale[row], out + row * n, n);
        for (long i = 0; i < n; i++) copy[row * n + i] = to[i];
    }
}

// ---------------------------------------------------------------- before attention: norm, query, key, value, rotation

typedef struct {
    void *gemm;
    long rows, hidden, heads, kv_heads, size;
    long block;  // rows that go through together
    int threads;
    float eps;
    const float *x; // [rows, hidden]
    long x_stride;
    const float *norm, *query_weight, *key_weight, *value_weight;
    const float *query_norm, *key_norm; // [size]; null: none
    const float *cos, *sin;             // [rows, size]
    float *scale;                       // [rows]
    float *query_in, *key_in;           // [rows, heads, size] before their norms; as query, key without norms
    float *query, *key, *value;         // [rows, heads, size]
    float *room;                        // before_room(..) floats
    const float *of_query, *of_key, *of_value;
    long of_query_stride, of_key_stride, of_value_stride;
    float *of_x;                                                 // [rows, hidden]
    float *of_norm, *of_query_norm, *of_key_norm;                // [threads, ..] to add to, or null
    float *of_query_weight, *of_key_weight, *of_value_weight;    // or null
    int keep;          // whether these are added to; else the first block writes them
    const float *more; // [rows, hidden], added to of_x, or null
} Before;

void before_forward(const Before *l) {
    int threads = l->threads;
    long H = l->hidden, Q = l->heads * l->size, K = l->kv_heads * l->size;
    for (long row = 0; row < l->rows; row += l->block) {
        long n = l->rows - row < l->block ? l->rows - row : l->block;
        float *normed = l->room, *q = l->query_in + row * Q, *k = l->key_in + row * K;
        rms_norm(l->x + row * l->x_stride, l->x_stride, l->norm, l->eps, normed, H, l->scale + row, n, H, threads);
        BY_WEIGHT(n, Q, H, normed, H, l->query_weight, 0.0f, q, Q);
        BY_WEIGHT(n, K, H, normed, H, l->key_weight, 0.0f, k, K);
        BY_WEIGHT(n, K, H, normed, H, l->value_weight, 0.0f, l->value + row * K, K);
        const float *cos = l->cos + row * l->size, *sin = l->sin + row * l->size;
        turn_heads(q, Q, l->query_norm, 0, l->heads, l->eps, cos, sin, l->size, 0, l->query + row * Q, Q, n, l->heads,
                   l->size, threads);
        turn_heads(k, K, l->key_norm, 0, l->kv_heads, l->eps, cos, sin, l->size, 0, l->key + row * K, K, n, l->kv_heads,
                   l->size, threads);
    }
}

// Heads of rows begin <= t < end: the gradient before rotation and norm -> to; that of the norm's weight is added to
// of_weight unless it is null.
HERE void heads_of_rows_back(const Before *l, const float *g, long stride, long heads, const float *before,
                             const float *weight, float *of_weight, long row, long begin, long end, float *to,
                             const long size) {
    float part[MOST];
    for (long i = 0; i < size; i++) part[i] = 0;
    long width = heads * size, summed = 0;
    for (long t = begin; t < end; t++) {
        const float *c = l->cos + (row + t) * size, *s = l->sin + (row + t) * size;
        for (long h = 0; h < heads; h++) {
            const float *x = before + (row + t) * width + h * size;
            float *here = to + t * width + h * size;
            turn_head_back(g + (row + t) * stride + h * size, c, s, here, size);
            if (!weight) continue;
            float scale = 1.0f / root(square_sum(x, size) / size + l->eps);
            norm_backward(here, x, weight, scale, 0, here, of_weight ? part : 0, size);
            if (of_weight && (++summed == TOGETHER || (t == end - 1 && h == heads - 1))) {
                flush(part, of_weight, size);
                summed = 0;
            }
        }
    }
}

// [n, heads, size] from `row` on
static void heads_back(const Before *l, const float *g, long stride, long heads, long row, long n, const float *before,
                       const float *weight, float *of_weight, float *to) {
    long runs = l->threads, each = (n + runs - 1) / runs, threads = l->threads, D = l->size;
    SHARED_ROWS(n * heads * D)
    for (long run = 0; run < runs; run++) {
        long end = (run + 1) * each < n ? (run + 1) * each : n;
        float *total = of_weight ? of_weight + run * D : 0;
        if (D == 32) heads_of_rows_back(l, g, stride, heads, before, weight, total, row, run * each, end, to, 32);
        else if (D == 64) heads_of_rows_back(l, g, stride, heads, before, weight, total, row, run * each, end, to, 64);
        else heads_of_rows_back(l, g, stride, heads, before, weight, total, row, run * each, end, to, D);
    }
}

void before_backward(const Before *l) {
    int threads = l->threads;
    long H = l->hidden, Q = l->heads * l->size, K = l->kv_heads * l->size;
    float *normed = l->room, *pull = normed + l->block * H, *q = pull + l->block * H, *k = q + l->block * Q;
    float *room = k + l->block * K;
    for (long row = 0; row < l->rows; row += l->block) {
        long n = l->rows - row < l->block ? l->rows - row : l->block;
        float keep = row || l->keep ? 1.0f : 0.0f;
        const float *x = l->x + row * l->x_stride;
        const float *v = l->of_value + row * l->of_value_stride;
        heads_back(l, l->of_query, l->of_query_stride, l->heads, row, n, l->query_in, l->query_norm, l->of_query_norm,
                   q);
        heads_back(l, l->of_key, l->of_key_stride, l->kv_heads, row, n, l->key_in, l->key_norm, l->of_key_norm, k);
        if (l->of_value_stride != K) {
            copy_rows(v, l->of_value_stride, room, K, n, K, threads);
            v = room;
        }
        norm_again(x, l->x_stride, l->norm, l->scale + row, normed, n, H, threads);
        OF_WEIGHT(Q, H, n, q, Q, normed, H, keep, l->of_query_weight);
        OF_WEIGHT(K, H, n, k, K, normed, H, keep, l->of_key_weight);
        OF_WEIGHT(K, H, n, v, K, normed, H, keep, l->of_value_weight);
        THROUGH_WEIGHT(n, H, Q, q, Q, l->query_weight, 0.0f, pull, H);
        THROUGH_WEIGHT(n, H, K, k, K, l->key_weight, 1.0f, pull, H);
        THROUGH_WEIGHT(n, H, K, v, K, l->value_weight, 1.0f, pull, H);
        norm_rows_backward(pull, H, x, l->x_stride, l->norm, l->scale + row, l->more ? l->more + row * H : 0, H,
                           l->of_x + row * H, H, l->of_norm, n, H, threads, threads);
    }
}

// ---------------------------------------------------------------- after attention: output, norm, SwiGLU

typedef struct {
    void *gemm;
    long rows, hidden, attended, inner;
    long block;
    int threads;
    float eps;
    const float *x, *out; // [rows, hidden], [rows, attended]
    long x_stride, out_stride;
    const float *out_weight, *norm, *gate_weight, *up_weight, *down_weight;
    float *middle;    // [rows, hidden]
    float *scale;     // [rows]
    float *gate, *up; // [rows, inner]; null: not kept
    float *y;         // [rows, hidden]
    float *room;
    const float *of_y;
    long of_y_stride;
    float *of_x, *of_out; // [rows, hidden], [rows, attended]
    float *of_norm;       // [threads, hidden] to add to, or null
    float *of_out_weight, *of_gate_weight, *of_up_weight, *of_down_weight; // or null
    int keep; // whether these are added to; else the first block writes them
} After;

void after_forward(const After *l) {
    int threads = l->threads;
    long H = l->hidden, A = l->attended, I = l->inner;
    float *normed = l->room, *gated = normed + l->block * H, *spare = gated + l->block * I;
    for (long row = 0; row < l->rows; row += l->block) {
        long n = l->rows - row < l->block ? l->rows - row : l->block;
        float *middle = l->middle + row * H, *y = l->y + row * H;
        float *gate = l->gate ? l->gate + row * I : spare, *up = l->up ? l->up + row * I : gated;
        BY_WEIGHT(n, H, A, l->out + row * l->out_stride, l->out_stride, l->out_weight, 0.0f, middle, H);
        add_and_norm(middle, l->x + row * l->x_stride, l->x_stride, l->norm, l->eps, normed, l->scale + row, y, n, H,
                     threads);
        BY_WEIGHT(n, I, H, normed, H, l->gate_weight, 0.0f, gate, I);
        BY_WEIGHT(n, I, H, normed, H, l->up_weight, 0.0f, up, I);
        swiglu(gate, I, up, I, gated, I, n, I, threads);
        BY_WEIGHT(n, H, I, gated, I, l->down_weight, 1.0f, y, H);
    }
}

// g -> of gate, of up, and silu(gate) * up itself in place of g; all [rows, n]
static void gated_back(float *g, const float *gate, const float *up, float *of_gate, float *of_up, long rows, long n,
                       int threads) {
    SHARED_ROWS(rows * n)
    for (long row = 0; row < rows; row++) {
        long i = row * n, end = i + n;
        vec first, second;
        for (; i + WIDTH <= end; i += WIDTH) {
            vec x = load(gate + i), u = load(up + i), pull = load(g + i);
            vec s = sigmoid(x), xs = x * s;
            store(of_up + i, pull * xs);
            store(of_gate + i, pull * u * (s + xs * (1.0f - s)));
            store(g + i, xs * u);
        }
        for (; i < end; i++) {
            swiglu_slope(all(g[i]), all(gate[i]), all(up[i]), &first, &second);
            vec x = all(gate[i]);
            of_gate[i] = first[0];
            of_up[i] = second[0];
            g[i] = (x * sigmoid(x))[0] * up[i];
        }
    }
}

void after_backward(const After *l) {
    int threads = l->threads;
    long H = l->hidden, A = l->attended, I = l->inner;
    float *normed = l->room, *pull = normed + l->block * H, *gated = pull + l->block * H;
    float *of_gate = gated + l->block * I, *of_up = of_gate + l->block * I;
    for (long row = 0; row < l->rows; row += l->block) {
        long n = l->rows - row < l->block ? l->rows - row : l->block;
        float keep = row || l->keep ? 1.0f : 0.0f;
        const float *g = l->of_y + row * l->of_y_stride, *middle = l->middle + row * H;
        const float *out = l->out + row * l->out_stride;
        float *of_x = l->of_x + row * H;
        THROUGH_WEIGHT(n, I, H, g, l->of_y_stride, l->down_weight, 0.0f, gated, I);
        gated_back(gated, l->gate + row * I, l->up + row * I, of_gate, of_up, n, I, threads);
        OF_WEIGHT(H, I, n, g, l->of_y_stride, gated, I, keep, l->of_down_weight);
        norm_again(middle, H, l->norm, l->scale + row, normed, n, H, threads);
        OF_WEIGHT(I, H, n, of_gate, I, normed, H, keep, l->of_gate_weight);
        OF_WEIGHT(I, H, n, of_up, I, normed, H, keep, l->of_up_weight);
        THROUGH_WEIGHT(n, H, I, of_gate, I, l->gate_weight, 0.0f, pull, H);
        THROUGH_WEIGHT(n, H, I, of_up, I, l->up_weight, 1.0f, pull, H);
        norm_rows_backward(pull, H, middle, H, l->norm, l->scale + row, g, l->of_y_stride, of_x, H, l->of_norm, n, H,
                           threads, threads);
        THROUGH_WEIGHT(n, A, H, of_x, H, l->out_weight, 0.0f, l->of_out + row * A, A);
        OF_WEIGHT(H, A, n, of_x, H, out, l->out_stride, keep, l->of_out_weight);
    }
}
