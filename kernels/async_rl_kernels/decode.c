// The embedded engine: attention over its cache, all layers of a decoder on the tokens of a step, and sampling. The
// cache is defined by generator/kv_cache.py and kv_blocks.py, a layer by model/fused_decoder.py, sampling by
// generator/sampling.py. native.c includes this file.

// ---------------------------------------------------------------- attention over the cache

// key, value [tokens, kv_heads, size] to `place` of `block` of stores [blocks, kv_heads, BLOCK, size]
void write_cache(const float *key, const float *value, long stride, float *keys, float *values, const int64_t *block,
                 const int64_t *place, long tokens, long kv_heads, long size) {
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < kv_heads; h++) {
            long to = ((block[t] * kv_heads + h) * BLOCK + place[t]) * size;
            const float *k = key + t * stride + h * size, *v = value + t * stride + h * size;
            for (long i = 0; i < size; i++) keys[to + i] = k[i];
            for (long i = 0; i < size; i++) values[to + i] = v[i];
        }
}

typedef struct {
    const float *query; // [tokens, heads, size]
    long stride;
    const float *keys, *values;
    const int64_t *table; // [slots, columns]
    long columns;
    const int64_t *length;        // [slots]
    const int64_t *filled, *first; // [blocks]
    const int64_t *slot, *position; // [tokens]
    long tokens, heads, kv_heads, size, window, threads;
    float scale;
    float *out; // [tokens, heads, size]
} Attention;

// A query on its way along its chain of blocks: sum [size] is what its weights so far make of the values, which are
// relative to `peak` and add up to `total`. Of the block at hand it sees the places low <= i < high.
typedef struct {
    const float *vector;
    float *sum, peak, total;
    int low, high;
} Query;

#define KEPT 32     // queries on their way
#define AT_ONCE 4   // that are multiplied together
#define SUM_PARTS 4 // vectors of a sum that are kept in registers

// Of each pair of runs of `size` lanes: the sum of a's two, then that of b's
#define HALVES(a, b, size)                                                                                              \
    choose((lane & size) == 0, a, b) + __builtin_shuffle(a, b, (lane ^ size) + (lane & size) / size * WIDTH)

// The products of a vector [D] and each of WIDTH rows [D], of which the first `rows` count; the others are finite
HERE vec row_products(const float *vector, const float *row, int rows, const int D) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vec x[WIDTH], own[D / WIDTH];
#pragma GCC unroll 8
    for (int c = 0; c < D / WIDTH; c++) own[c] = load(vector + c * WIDTH);
#pragma GCC unroll 4
    for (int first = 0; first < WIDTH; first += 4)
        if (first < rows) {
#pragma GCC unroll 4
            for (int j = first; j < first + 4; j++) {
                x[j] = own[0] * load(row + j * D);
#pragma GCC unroll 8
                for (int c = 1; c < D / WIDTH; c++) x[j] += own[c] * load(row + j * D + c * WIDTH);
            }
        } else {
#pragma GCC unroll 4
            for (int j = first; j < first + 4; j++) x[j] = (vec){};
        }
    // lane j is to be the sum of x[j]: each time two of them become one
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) x[j] = HALVES(x[j], x[j + 8], 8);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) x[j] = HALVES(x[j], x[j + 4], 4);
    x[0] = HALVES(x[0], x[2], 2);
    x[1] = HALVES(x[1], x[3], 2);
    return HALVES(x[0], x[1], 1);
}

// N queries attend to one block of one head, key and value [BLOCK, D]. N and D are constants once this is inlined; the
// order in which a query's sums are made does not depend on N.
HERE void attend_block(Query *const *q, const float *key, const float *value, float scale, const int N, const int D) {
    const ivec lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    int low = q[0]->low, high = q[0]->high;
    for (int i = 1; i < N; i++) {
        if (q[i]->low < low) low = q[i]->low;
        if (q[i]->high > high) high = q[i]->high;
    }
    float weight[N][BLOCK];
    vec before = {}, both[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) {
        ivec seen_near = (lane >= q[i]->low) & (lane < q[i]->high);
        ivec seen_far = (lane + WIDTH >= q[i]->low) & (lane + WIDTH < q[i]->high);
        vec u = choose(seen_near, row_products(q[i]->vector, key, high, D) * scale, all(-1e30f)), v = all(-1e30f);
        if (high > WIDTH)
            v = choose(seen_far, row_products(q[i]->vector, key + WIDTH * D, high - WIDTH, D) * scale, v);
        float here = peak_of(choose(u > v, u, v));
        float most = here > q[i]->peak ? here : q[i]->peak;
        u = (vec)((ivec)exponential(u - most) & seen_near);
        v = high > WIDTH ? (vec)((ivec)exponential(v - most) & seen_far) : all(0);
        store(weight[i], u);
        store(weight[i] + WIDTH, v);
        both[i] = u + v;
        before[i] = q[i]->peak - most;
        q[i]->peak = most;
    }
    before = exponential(before);
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) q[i]->total = q[i]->total * before[i] + sum_of(both[i]);
    const int split = D >= 64 ? 1 : 2; // so that additions need not wait for each other
    const int parts = D / WIDTH / split < SUM_PARTS ? D / WIDTH : SUM_PARTS;
#pragma GCC unroll 2
    for (int c = 0; c < D / WIDTH; c += parts) {
        const int n = D / WIDTH - c < parts ? D / WIDTH - c : parts;
        vec sum[N][SUM_PARTS], odd[N][SUM_PARTS];
#pragma GCC unroll 4
        for (int i = 0; i < N; i++)
#pragma GCC unroll 4
            for (int k = 0; k < n; k++) {
                sum[i][k] = load(q[i]->sum + (c + k) * WIDTH) * before[i];
                odd[i][k] = (vec){};
            }
        if (split == 1)
            for (int j = low; j < high; j++)
#pragma GCC unroll 4
                for (int k = 0; k < n; k++) {
                    vec v = load(value + j * D + (c + k) * WIDTH);
#pragma GCC unroll 4
                    for (int i = 0; i < N; i++) sum[i][k] += weight[i][j] * v;
                }
        else
            for (int j = low & ~1; j < high; j += 2) // what lies behind `high` has weight 0
#pragma GCC unroll 4
                for (int k = 0; k < n; k++) {
                    vec v = load(value + j * D + k * WIDTH), w = load(value + (j + 1) * D + k * WIDTH);
#pragma GCC unroll 4
                    for (int i = 0; i < N; i++) {
                        sum[i][k] += weight[i][j] * v;
                        odd[i][k] += weight[i][j + 1] * w;
                    }
                }
#pragma GCC unroll 4
        for (int i = 0; i < N; i++)
#pragma GCC unroll 4
            for (int k = 0; k < n; k++) store(q[i]->sum + (c + k) * WIDTH, sum[i][k] + odd[i][k]);
    }
}

// `heads` query heads of one key-value head, from `head` on, of tokens begin <= t < end: at most KEPT queries. Tokens
// beside each other that have a block in common read it together.
HERE void attend_tokens(const Attention *a, long kv, long head, long heads, long begin, long end, const int D) {
    float sum[KEPT * D];
    Query kept[KEPT], *chosen[KEPT];
    long longest = 0;
    for (long t = begin; t < end; t++) {
        for (long h = 0; h < heads; h++) {
            long i = (t - begin) * heads + h;
            kept[i] = (Query){.vector = a->query + t * a->stride + (head + h) * D, .sum = sum + i * D, .peak = -1e30f};
            for (int d = 0; d < D; d += WIDTH) store(kept[i].sum + d, (vec){});
        }
        if (a->length[a->slot[t]] > longest) longest = a->length[a->slot[t]];
    }
    for (long column = 0; column < longest; column++)
        for (long t = begin; t < end;) {
            long block = -1, n = 0;
            for (; t < end; t++) {
                long slot = a->slot[t];
                if (column >= a->length[slot]) {
                    if (n) break;
                    continue;
                }
                long own = a->table[slot * a->columns + column];
                if (n && own != block) break;
                long first = a->first[own], high = a->position[t] - first + 1;
                if (high > a->filled[own]) high = a->filled[own];
                long low = a->window ? a->position[t] - a->window + 1 - first : 0;
                if (low < 0) low = 0;
                if (low >= high) continue;
                block = own;
                for (long h = 0; h < heads; h++) {
                    Query *q = kept + (t - begin) * heads + h;
                    q->low = low, q->high = high;
                    chosen[n++] = q;
                }
            }
            if (!n) continue;
            const float *key = a->keys + (block * a->kv_heads + kv) * D * BLOCK;
            const float *value = a->values + (block * a->kv_heads + kv) * D * BLOCK;
            Query **q = chosen;
            for (; n >= AT_ONCE; n -= AT_ONCE, q += AT_ONCE) attend_block(q, key, value, a->scale, AT_ONCE, D);
            if (n == 3) attend_block(q, key, value, a->scale, 3, D);
            if (n == 2) attend_block(q, key, value, a->scale, 2, D);
            if (n == 1) attend_block(q, key, value, a->scale, 1, D);
        }
    for (long t = begin; t < end; t++)
        for (long h = 0; h < heads; h++) {
            Query *q = kept + (t - begin) * heads + h;
            float *out = a->out + (t * a->heads + head + h) * D;
            for (int d = 0; d < D; d += WIDTH) store(out + d, load(q->sum + d) / q->total);
        }
}

#define OF_SIZE(D)                                                                                                      \
    static void attend_##D(const Attention *a, long kv, long head, long heads, long begin, long end) {                \
        attend_tokens(a, kv, head, heads, begin, end, D);                                                               \
    }
OF_SIZE(16)
OF_SIZE(32)
OF_SIZE(64)
OF_SIZE(96)
OF_SIZE(128)

// Tokens of `slot` at `position` attend to what its chain holds up to there. size is 16, 32, 64, 96 or 128.
void attend(const Attention *a) {
    long shared = a->heads / a->kv_heads, threads = a->threads, heads = shared < KEPT ? shared : KEPT;
    long each = KEPT / heads, tiles = (a->tokens + each - 1) / each;
#pragma omp parallel for collapse(2) num_threads(threads) schedule(static) if (threads > 1 && a->tokens * a->heads > 64)
    for (long kv = 0; kv < a->kv_heads; kv++)
        for (long tile = 0; tile < tiles; tile++) {
            long begin = tile * each, end = begin + each < a->tokens ? begin + each : a->tokens;
            for (long done = 0; done < shared; done += heads) {
                long some = shared - done < heads ? shared - done : heads;
                switch (a->size) {
#define CASE(D) case D: attend_##D(a, kv, kv * shared + done, some, begin, end); break;
                    CASE(16)
                    CASE(32)
                    CASE(64)
                    CASE(96)
                    CASE(128)
                }
            }
        }
}

// ---------------------------------------------------------------- all layers on the tokens of a step

typedef struct {
    const float *first_norm, *query_key_value, *out, *second_norm, *gate_up, *down; // products' weights are [in, out]
    const float *norms;    // [2, size] of query and key; null: none
    float *keys, *values;  // of the cache
    long window;
} DecodeLayer;

typedef struct {
    void *gemm;
    long tokens, hidden, heads, kv_heads, size, inner, layers, vocabulary, wanted;
    long block_rows; // tokens that go through all layers together; those behind them attend to what these have written
    int threads;
    float eps;
    const int64_t *token, *position, *block, *place; // [tokens]
    const int64_t *last;                             // [wanted], ascending: tokens whose logits are asked for
    const float *embedding, *final_norm, *head, *rotation; // rotation [positions, 2, size]: cos, sin
    const DecodeLayer *layer;                              // [layers]
    const Attention *attention;
    float *room;   // block_rows * (2 hidden + (2 heads + 2 kv_heads) size + 3 inner) + wanted * hidden
    float *logits; // [wanted, vocabulary]
} Decode;

// Tokens from `begin` on, at most block_rows; the `wanted` of them with logits, numbered in `last`, go to `final`.
static void decode_rows(const Decode *l, long begin, long T, const int64_t *last, long wanted, float *final) {
    long H = l->hidden, D = l->size, I = l->inner, rotated = l->heads + l->kv_heads;
    long A = l->heads * D, width = (rotated + l->kv_heads) * D, rows = l->block_rows;
    int threads = l->threads;
    float *x = l->room, *normed = x + rows * H, *each = normed + rows * H, *attended = each + rows * width;
    float *gate_up = attended + rows * A, *gated = gate_up + rows * 2 * I;
    int64_t slot[wanted + 1], position[wanted + 1];
    Attention a = *l->attention;
    a.tokens = T, a.slot += begin, a.position += begin, a.query = each, a.stride = width, a.out = attended;
    for (long t = 0; t < T; t++)
        for (long i = 0; i < H; i++) x[t * H + i] = l->embedding[l->token[begin + t] * H + i];
    for (const DecodeLayer *layer = l->layer; layer < l->layer + l->layers; layer++) {
        rms_norm(x, H, layer->first_norm, l->eps, normed, H, 0, T, H, threads);
        THROUGH_WEIGHT(T, width, H, normed, H, layer->query_key_value, 0.0f, each, width);
        turn_heads(each, width, layer->norms, layer->norms ? layer->norms + D : 0, l->heads, l->eps, l->rotation,
                   l->rotation + D, 2 * D, l->position + begin, each, width, T, rotated, D, threads);
        write_cache(each + A, each + rotated * D, width, layer->keys, layer->values, l->block + begin, l->place + begin,
                    T, l->kv_heads, D);
        if (layer == l->layer + l->layers - 1 && wanted < T) { // the other tokens have left their keys and values
            for (long n = 0; n < wanted; n++) {
                long t = last[n] - begin; // n <= t
                slot[n] = a.slot[t], position[n] = a.position[t];
                for (long i = 0; i < H; i++) x[n * H + i] = x[t * H + i];
                for (long i = 0; i < A; i++) each[n * width + i] = each[t * width + i];
            }
            a.tokens = T = wanted, a.slot = slot, a.position = position;
            if (!T) return;
        }
        a.window = layer->window, a.keys = layer->keys, a.values = layer->values;
        attend(&a);
        THROUGH_WEIGHT(T, H, A, attended, A, layer->out, 1.0f, x, H);
        rms_norm(x, H, layer->second_norm, l->eps, normed, H, 0, T, H, threads);
        THROUGH_WEIGHT(T, 2 * I, H, normed, H, layer->gate_up, 0.0f, gate_up, 2 * I);
        swiglu(gate_up, 2 * I, gate_up + I, 2 * I, gated, I, T, I, threads);
        THROUGH_WEIGHT(T, H, I, gated, I, layer->down, 1.0f, x, H);
    }
    rms_norm(x, H, l->final_norm, l->eps, final, H, 0, T, H, threads);
}

void decode(const Decode *l) {
    long H = l->hidden, rows = l->block_rows, done = 0;
    float *final = l->room + rows * (2 * H + (2 * l->heads + 2 * l->kv_heads) * l->size + 3 * l->inner);
    for (long begin = 0; begin < l->tokens; begin += rows) {
        long T = l->tokens - begin < rows ? l->tokens - begin : rows, wanted = 0;
        while (done + wanted < l->wanted && l->last[done + wanted] < begin + T) wanted++;
        decode_rows(l, begin, T, l->last + done, wanted, final + done * H);
        done += wanted;
    }
    if (done) BY_WEIGHT(done, l->vocabulary, H, final, H, l->head, 0.0f, l->logits, l->vocabulary);
}

// ---------------------------------------------------------------- sampling: generator/sampling.py defines it

// One token of each row of logits [rows, n], which are overwritten: the first one whose cumulative weight exceeds
// uniform times the total, or at temperature 0 the likeliest. log_prob is that of the distribution sampled from.
void draw(float *logits, const float *temperature, const double *uniform, int64_t *token, float *log_prob, long rows,
          long n) {
    for (long row = 0; row < rows; row++) {
        float *x = logits + row * n, heat = temperature[row];
        if (heat != 1.0f && heat != 0.0f)
            for (long i = 0; i < n; i++) x[i] /= heat;
        long likeliest = 0;
        float peak = x[0];
        int bad = 0;
        for (long i = 0; i < n; i++) {
            bad |= !(x[i] < __builtin_inff());
            if (x[i] > peak) peak = x[i], likeliest = i;
        }
        token[row] = 0;
        log_prob[row] = __builtin_nanf("");
        if (bad || peak == -__builtin_inff()) continue;
        long i = 0;
        for (; i + WIDTH <= n; i += WIDTH) {
            vec less = load(x + i) - peak;
            store(x + i, choose(less < -87.0f, all(0), exponential(less)));
        }
        for (; i < n; i++) x[i] = x[i] - peak < -87.0f ? 0 : exponential(all(x[i] - peak))[0];
        double total = 0;
        for (i = 0; i < n; i++) total += x[i];
        long found = likeliest;
        if (heat != 0.0f) {
            double target = uniform[row] * total, sum = 0;
            for (found = 0; found < n - 1; found++)
                if ((sum += x[found]) > target) break;
            while (found && x[found] == 0) found--;
        }
        token[row] = found;
        log_prob[row] = __builtin_log((double)x[found]) - __builtin_log(total);
    }
}

// ---------------------------------------------------------------- several steps in a row: generator/embedded.py

typedef struct {
    Decode *decode; // of one token a row, all of them wanted
    Attention *attention;
    long most;         // steps
    double seconds;    // after which no other step begins
    int64_t *token, *position, *place;   // [rows], what decode reads: of the step before
    const int64_t *block;                // [rows]
    double *uniform;                     // [rows], room
    float *heat, *log_prob;              // [rows], room
    int64_t *drawn;                      // [rows], the last step's tokens
    // of slots
    int32_t *tokens, *versions; // [slots, context]
    float *log_probs;           // the same
    long context;
    int64_t *known;
    const int64_t *limit, *rule;
    const uint64_t *seed;
    const float *temperature;
    int version;
    const uint8_t *ends, *maybe; // [rules, vocabulary]
    // of blocks: [blocks], [slots] and [blocks, BLOCK]
    int64_t *filled, *cached;
    int32_t *block_tokens;
} Steps;

static uint64_t mixed(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
}

// Feeds to every row the token that it has sampled last, and samples the next one, until a turn may be over or a
// log-prob is not finite. Returns the number of steps taken; of the last one, what was drawn is in drawn and log_prob,
// and all but what is not finite has been noted, as in the others.
long take_steps(const Steps *s) {
    const Decode *l = s->decode;
    long rows = l->tokens, step = 0, over = 0;
    double until = now() + s->seconds;
    while (step < s->most && !over && (!step || now() < until)) {
        for (long r = 0; r < rows; r++) {
            long slot = s->attention->slot[r], block = s->block[r];
            s->token[r] = s->tokens[slot * s->context + ++s->position[r]];
            s->place[r] = s->filled[block]++;
            s->block_tokens[block * BLOCK + s->place[r]] = s->token[r];
            s->cached[slot]++;
            s->heat[r] = s->temperature[slot];
            uint64_t golden = 0x9E3779B97F4A7C15u; // trajectory/noise.py defines the noise
            uint64_t state = mixed(s->seed[slot] + golden) + golden * ((uint64_t)s->known[slot] + 1);
            s->uniform[r] = (double)(mixed(state) >> 12) * 0x1p-52;
        }
        decode(l);
        draw(l->logits, s->heat, s->uniform, s->drawn, s->log_prob, rows, l->vocabulary);
        step++;
        for (long r = 0; r < rows; r++) {
            long slot = s->attention->slot[r], at = s->known[slot], rule = s->rule[slot] * l->vocabulary + s->drawn[r];
            if (!__builtin_isfinite(s->log_prob[r])) {
                over = 1;
                continue;
            }
            s->tokens[slot * s->context + at] = s->drawn[r];
            s->log_probs[slot * s->context + at] = s->log_prob[r];
            s->versions[slot * s->context + at] = s->version;
            s->known[slot] = at + 1;
            over |= s->ends[rule] | s->maybe[rule] | (at + 1 >= s->limit[slot]);
        }
    }
    return step;
}
