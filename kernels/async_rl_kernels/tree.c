// Attention in training among the rows of a tree, forward and backward, float32. native.c includes this file;
// model/merged_attention.py calls it and has the definition.
//
// Everything is a product of a few queries or keys with many rows whose sums stay in registers. A root of the tree and
// the runs below it are computed by themselves for one head of keys: what they read and add to stays in the caches.

// Rows of a run attend to themselves up to their own place and to all rows of the runs above it (`parent`, -1: none).
typedef struct {
    const float *query, *key, *value; // [rows, heads, size] and [rows, kv_heads, size]
    long query_stride, key_stride, value_stride;
    const int64_t *runs; // [runs, 3]: begin, end, parent
    long count, rows, heads, kv_heads, size;
    long longest; // most keys of a row, each run's rounded up to WIDTH
    float scale;
    int threads;
    float *out, *log_sum; // [rows, heads, size], [rows, heads]
    const float *gradient; // of out
    long gradient_stride;
    float *of_query, *of_key, *of_value; // gradients
} Tree;

#ifdef __AVX512F__
#define QUERIES 8 // attend together
#define ACROSS 2  // vectors of each whose sums are in registers
#else
#define QUERIES 4
#define ACROSS 1
#endif
#define TILE 32  // queries whose weights are kept until the gradients of keys and values are summed
#define DEPTH 64 // runs above each other: merged_attention.py
#define WIDEST 128

typedef struct {
    long number;                                 // of pieces: the run itself, then those above it
    long begin[DEPTH], length[DEPTH], at[DEPTH]; // rows, and their first place among the scores of a query
    long place[DEPTH];                           // among the turned rows
    long above;                                  // places of the runs above
} Pieces;

static long padded(long n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

static void pieces_of(const Tree *a, long run, const long *place, Pieces *b) {
    b->number = b->above = 0;
    for (long r = run; r >= 0; r = a->runs[3 * r + 2]) {
        b->begin[b->number] = a->runs[3 * r];
        b->length[b->number] = a->runs[3 * r + 1] - a->runs[3 * r];
        b->at[b->number] = b->above;
        b->place[b->number] = place[r];
        if (b->number++) b->above += padded(a->runs[3 * r + 1] - a->runs[3 * r]);
    }
    b->at[0] = b->above; // the run itself is last, since these see a part of it
}

// Rows begin <= row < end of [rows, .., D] as [D, padded length] from `to` on.
HERE void turn_rows(const float *from, long stride, long begin, long end, float *to, const int D) {
    long width = padded(end - begin);
    for (long j = 0; j < width; j += WIDTH) {
        const float *rows = from + (begin + j) * stride;
        long step = stride, there = end - begin - j;
        float rest[WIDTH * WIDEST];
        if (there < WIDTH) {
            for (long i = 0; i < WIDTH; i++)
                for (int d = 0; d < D; d++) rest[i * D + d] = i < there ? rows[i * stride + d] : 0;
            rows = rest, step = D;
        }
#ifdef __AVX__
        for (int d = 0; d < D; d += 8) turn_lines(rows + d, step, to + d * width + j, width, 0);
#else
        for (int d = 0; d < D; d++)
            for (long i = 0; i < WIDTH; i++) to[d * width + j + i] = rows[i * step + d];
#endif
    }
}

// to [N, C vectors] = (add: itself) + the sum over k < depth of left[i row + k step] right[k, C vectors]
HERE void multiply(const float *left, long row, long step, const float *right, long right_stride, long depth, float *to,
                   long to_stride, const int N, const int C, const int add) {
    vec sum[QUERIES][4];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) sum[i][c] = add ? load(to + i * to_stride + c * WIDTH) : (vec){};
    for (long k = 0; k < depth; k++) {
        vec part[4];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) part[c] = load(right + k * right_stride + c * WIDTH);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            vec one = all(left[i * row + k * step]);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) sum[i][c] += one * part[c];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) store(to + i * to_stride + c * WIDTH, sum[i][c]);
}

// The same for `width` columns, a multiple of WIDTH.
HERE void multiply_wide(const float *left, long row, long step, const float *right, long right_stride, long depth,
                        float *to, long to_stride, long width, const int add) {
    long j = 0;
    for (; j + ACROSS * WIDTH <= width; j += ACROSS * WIDTH)
        multiply(left, row, step, right + j, right_stride, depth, to + j, to_stride, QUERIES, ACROSS, add);
    for (; j < width; j += WIDTH)
        multiply(left, row, step, right + j, right_stride, depth, to + j, to_stride, QUERIES, 1, add);
}

// e^(score - peak) where that is not more than 1; 0 below e^-87
HERE vec weight_of(vec score, float peak) {
    vec x = score - peak;
    return (vec)((ivec)exponential_within(x) & ~(x < -87.0f));
}

// Of queries i < QUERIES, row[i] each, vectors [QUERIES, D]: scores [QUERIES, longest]; those of rows that one does not
// see are -1e30. Returns the number of places.
HERE long scores_of(const Tree *a, const Pieces *b, const float *vectors, const long *row, const float *keys,
                    float *scores, const int D) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    long own = padded(row[QUERIES - 1] - b->begin[0] + 1);
    for (long piece = 0; piece < b->number; piece++) {
        long stride = padded(b->length[piece]), width = piece ? stride : own;
        float *to = scores + b->at[piece];
        multiply_wide(vectors, D, 1, keys + b->place[piece] * D, stride, D, to, a->longest, width, 0);
        for (int i = 0; i < QUERIES; i++) {
            long seen = piece ? b->length[piece] : row[i] - b->begin[0] + 1;
            for (long j = seen / WIDTH * WIDTH; j < width; j += WIDTH) {
                vec s = load(to + i * a->longest + j);
                store(to + i * a->longest + j, choose(lane + (int)j < (int)seen, s, all(-1e30f)));
            }
        }
    }
    return b->above + own;
}

// Queries first <= n < first + QUERIES of a run, of which `real` exist, as [QUERIES, D] times `by`; others are zeros.
// index: row * heads + head; those that do not exist have the last one's.
HERE void take_queries(const Tree *a, long kv, const Pieces *b, const float *from, long stride, float by, long first,
                       long real, float *to, long *row, long *index, const int D) {
    long shared = a->heads / a->kv_heads;
    for (long i = 0; i < QUERIES; i++) {
        long n = first + (i < real ? i : real - 1), head = kv * shared + n % shared;
        row[i] = b->begin[0] + n / shared;
        index[i] = row[i] * a->heads + head;
        const float *here = from + row[i] * stride + head * D;
        by = i < real ? by : 0;
        for (int d = 0; d < D; d += WIDTH) store(to + i * D + d, load(here + d) * by);
    }
}

// sum [QUERIES, D] = weights [QUERIES, longest] of the rows of all pieces, up to row `last` of the first one
HERE void sum_rows(const Tree *a, const Pieces *b, const float *weights, const float *rows, long stride, long last,
                   float *sum, const int D) {
    const int columns = D % (3 * WIDTH) ? (D / WIDTH < ACROSS ? D / WIDTH : ACROSS) : ACROSS > 1 ? 3 : 1;
    for (int c = 0; c < D; c += columns * WIDTH)
        for (long piece = 0; piece < b->number; piece++) {
            const float *from = rows + b->begin[piece] * stride + c, *by = weights + b->at[piece];
            long length = piece ? b->length[piece] : last - b->begin[0] + 1;
            if (piece) multiply(by, a->longest, 1, from, stride, length, sum + c, D, QUERIES, columns, 1);
            else multiply(by, a->longest, 1, from, stride, length, sum + c, D, QUERIES, columns, 0);
        }
}

HERE void forward_run(const Tree *a, long kv, const Pieces *b, const float *keys, float *scores, const int D) {
    long queries = b->length[0] * (a->heads / a->kv_heads), row[QUERIES], index[QUERIES];
    float vectors[QUERIES * WIDEST], sum[QUERIES * WIDEST];
    for (long first = 0; first < queries; first += QUERIES) {
        long real = queries - first < QUERIES ? queries - first : QUERIES;
        take_queries(a, kv, b, a->query, a->query_stride, a->scale, first, real, vectors, row, index, D);
        long places = scores_of(a, b, vectors, row, keys, scores, D);
        float total[QUERIES];
        for (int i = 0; i < QUERIES; i++) {
            float *s = scores + i * a->longest;
            vec peaks = all(-1e30f), weights = {};
            for (long j = 0; j < places; j += WIDTH) peaks = larger(load(s + j), peaks);
            float peak = peak_of(peaks);
            for (long j = 0; j < places; j += WIDTH) {
                vec p = weight_of(load(s + j), peak);
                weights += p;
                store(s + j, p);
            }
            total[i] = sum_of(weights);
            if (i < real) a->log_sum[index[i]] = peak + __builtin_logf(total[i]);
        }
        sum_rows(a, b, scores, a->value + kv * D, a->value_stride, row[QUERIES - 1], sum, D);
        for (long i = 0; i < real; i++)
            for (int d = 0; d < D; d += WIDTH) store(a->out + index[i] * D + d, load(sum + i * D + d) * (1 / total[i]));
    }
}

// rows [length, D] += weights [queries, longest]^T of vectors [queries, D]. row: the place of each query where it sees
// the rows up to there only, else null.
HERE void add_to_rows(float *rows, const float *weights, long longest, const float *vectors, const long *place,
                      long queries, long length, const int D) {
    const int columns = D % (3 * WIDTH) ? (D / WIDTH < ACROSS ? D / WIDTH : ACROSS) : ACROSS > 1 ? 3 : 1;
    long from = 0;
    for (long j = 0; j < length; j += QUERIES) {
        if (place)
            while (from < queries && place[from] < j) from++;
        for (int c = 0; c < D; c += columns * WIDTH)
            multiply(weights + from * longest + j, 1, longest, vectors + from * D + c, D, queries - from,
                     rows + j * D + c, D, QUERIES, columns, 1);
    }
}

// of_keys, of_values: as keys and values, which are turned, but row by row
HERE void backward_run(const Tree *a, long kv, const Pieces *b, const float *keys, const float *values, float *of_keys,
                       float *of_values, float *scores, float *slopes, const int D) {
    long queries = b->length[0] * (a->heads / a->kv_heads), row[TILE], index[QUERIES];
    float vectors[TILE * WIDEST], pulls[TILE * WIDEST], sum[QUERIES * WIDEST];
    for (long begin = 0; begin < queries; begin += TILE) {
        long tile = queries - begin < TILE ? queries - begin : TILE;
        for (long first = 0; first < tile; first += QUERIES) {
            long real = tile - first < QUERIES ? tile - first : QUERIES;
            float *v = vectors + first * D, *g = pulls + first * D;
            take_queries(a, kv, b, a->gradient, a->gradient_stride, 1, begin + first, real, g, row + first, index, D);
            take_queries(a, kv, b, a->query, a->query_stride, a->scale, begin + first, real, v, row + first, index, D);
            float *weight = scores + first * a->longest, *slope = slopes + first * a->longest;
            long last = row[first + QUERIES - 1], places = scores_of(a, b, v, row + first, keys, weight, D);
            for (long piece = 0; piece < b->number; piece++)
                multiply_wide(g, D, 1, values + b->place[piece] * D, padded(b->length[piece]), D, slope + b->at[piece],
                              a->longest, piece ? padded(b->length[piece]) : places - b->above, 0);
            for (int i = 0; i < QUERIES; i++) {
                float *s = weight + i * a->longest, *t = slope + i * a->longest, log_sum = a->log_sum[index[i]];
                vec part = {};
                for (int d = 0; d < D; d += WIDTH) part += load(g + i * D + d) * load(a->out + index[i] * D + d);
                float pull = sum_of(part);
                for (long j = 0; j < places; j += WIDTH) {
                    vec p = weight_of(load(s + j), log_sum);
                    store(s + j, p);
                    store(t + j, p * (load(t + j) - pull));
                }
            }
            sum_rows(a, b, slope, a->key + kv * D, a->key_stride, last, sum, D);
            for (long i = 0; i < real; i++)
                for (int d = 0; d < D; d += WIDTH)
                    store(a->of_query + index[i] * D + d, load(sum + i * D + d) * a->scale);
        }
        for (long i = 0; i < tile; i++) row[i] -= b->begin[0];
        for (long piece = 0; piece < b->number; piece++) {
            long length = piece ? b->length[piece] : row[tile - 1] + 1, at = b->place[piece] * D;
            const long *place = piece ? 0 : row;
            add_to_rows(of_keys + at, slopes + b->at[piece], a->longest, vectors, place, tile, length, D);
            add_to_rows(of_values + at, scores + b->at[piece], a->longest, pulls, place, tile, length, D);
        }
    }
}

// The root `first` and all runs below it, up to run `end`. places: of the turned rows of all these.
HERE void forward_below(const Tree *a, long kv, long first, long end, const long *place, float *room, long places,
                        const int D) {
    float *keys = room, *scores = keys + places * D;
    Pieces b;
    for (long run = first; run < end; run++) {
        turn_rows(a->key + kv * D, a->key_stride, a->runs[3 * run], a->runs[3 * run + 1], keys + place[run] * D, D);
        pieces_of(a, run, place, &b);
        forward_run(a, kv, &b, keys, scores, D);
    }
}

HERE void backward_below(const Tree *a, long kv, long first, long end, const long *place, float *room, long places,
                         const int D) {
    float *keys = room, *values = keys + places * D, *of_keys = values + places * D, *of_values = of_keys + places * D;
    float *scores = of_values + places * D, *slopes = scores + TILE * a->longest;
    for (long i = 0; i < 2 * places * D; i++) of_keys[i] = 0;
    Pieces b;
    for (long run = first; run < end; run++) {
        long begin = a->runs[3 * run], stop = a->runs[3 * run + 1];
        turn_rows(a->key + kv * D, a->key_stride, begin, stop, keys + place[run] * D, D);
        turn_rows(a->value + kv * D, a->value_stride, begin, stop, values + place[run] * D, D);
        pieces_of(a, run, place, &b);
        backward_run(a, kv, &b, keys, values, of_keys, of_values, scores, slopes, D);
    }
    for (long run = first; run < end; run++)
        for (long row = a->runs[3 * run], from = place[run] * D; row < a->runs[3 * run + 1]; row++, from += D)
            for (int d = 0; d < D; d += WIDTH) {
                long to = (row * a->kv_heads + kv) * D + d;
                store(a->of_key + to, load(of_keys + from + d));
                store(a->of_value + to, load(of_values + from + d));
            }
}

// root [roots + 1]: the runs that begin a tree of their own, and the end. place: of each run among the turned rows of
// its tree. Returns the most places of one.
static long divide(const Tree *a, long *root, long *place, long *roots) {
    long most = 0, places = 0;
    *roots = 0;
    for (long run = 0; run < a->count; run++) {
        if (a->runs[3 * run + 2] < 0) {
            root[(*roots)++] = run;
            places = 0;
        }
        place[run] = places;
        places += padded(a->runs[3 * run + 1] - a->runs[3 * run]);
        if (places > most) most = places;
    }
    root[*roots] = a->count;
    return most;
}

#define EACH_SIZE(call)                                                                                                \
    switch (a->size) {                                                                                                 \
        case 16: call(16); break;                                                                                      \
        case 32: call(32); break;                                                                                      \
        case 64: call(64); break;                                                                                      \
        case 96: call(96); break;                                                                                      \
        case 128: call(128); break;                                                                                    \
    }

// Returns 0, or 1 where memory ran out. Trees and heads are shared by threads, so every sum has one order.
static int below_all(const Tree *a, int backward) {
    long *place = malloc((2 * a->count + 1) * sizeof(long)), roots, failed = 0;
    if (!place) return 1;
    long *root = place + a->count, places = divide(a, root, place, &roots), threads = a->threads;
    long floats = backward ? 4 * places * a->size + 2 * TILE * a->longest : places * a->size + QUERIES * a->longest;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *room = malloc(floats * sizeof(float));
        failed = !room;
#pragma omp for collapse(2)
        for (long tree = 0; tree < roots; tree++)
            for (long kv = 0; kv < a->kv_heads; kv++)
                if (room) {
#define BELOW(D)                                                                                                       \
    if (backward) backward_below(a, kv, root[tree], root[tree + 1], place, room, places, D);                           \
    else forward_below(a, kv, root[tree], root[tree + 1], place, room, places, D)
                    EACH_SIZE(BELOW)
                }
        free(room);
    }
    free(place);
    return failed;
}

int tree_forward(const Tree *a) { return below_all(a, 0); }

int tree_backward(const Tree *a) { return below_all(a, 1); }
