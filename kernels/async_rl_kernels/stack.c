// Several layers of a decoder, forward and backward, float32: a part of the rows, whole trees, goes through all of them
// before the next part does, so what one layer hands to the next lies in the caches. native.c includes this file;
// model/compiled_stack.py calls it.

typedef struct {
    const float *norm, *query_weight, *key_weight, *value_weight;
    const float *query_norm, *key_norm; // null: none
    const float *out_weight, *second_norm, *gate_weight, *up_weight, *down_weight;
    // kept for the backward pass: layers.c, tree.c
    float *scale, *query_in, *key_in, *query, *key, *value, *out, *log_sum, *middle, *second_scale, *gate, *up, *y;
    // gradients, null where not wanted; those of norms are [threads, ..] of zeros
    float *of_norm, *of_query_weight, *of_key_weight, *of_value_weight, *of_query_norm, *of_key_norm;
    float *of_out_weight, *of_second_norm, *of_gate_weight, *of_up_weight, *of_down_weight;
} StackLayer;

typedef struct {
    void *gemm;
    long rows, hidden, heads, kv_heads, size, inner, layers;
    long block;  // rows that go through a layer together
    long widest; // rows of a part
    int threads;
    float eps;
    const float *x, *cos, *sin; // [rows, hidden], [rows, size]
    const int64_t *parts;       // [count + 1, 3]: row, run, asked-for row with which each begins; the end
    long count;
    const int64_t *runs; // [runs, 3]: begin, end, parent, counted from the part's beginning
    long longest;        // tree.c
    float scale;
    const int64_t *asked; // rows behind the last layer, rising; null: all
    const StackLayer *layer;
    float *room;       // stack_room(..) floats
    const float *of_y; // [asked-for rows, hidden]
    float *of_x;       // [rows, hidden]
} Stack;

// The rows of a part that go through the second half of a layer: their first one's place, and how many there are
typedef struct {
    long row, rows, run, runs, taken, to_take;
    int picks;
} Part;

static Part part_of(const Stack *s, long number, long layer) {
    const int64_t *p = s->parts + 3 * number;
    Part found = {p[0], p[3] - p[0], p[1], p[4] - p[1], p[0], p[3] - p[0], s->asked && layer == s->layers - 1};
    if (found.picks) found.taken = p[2], found.to_take = p[5] - p[2];
    return found;
}

long stack_room(const Stack *s) {
    long A = s->heads * s->size, K = s->kv_heads * s->size, rows = s->widest;
    long before = 2 * s->hidden + A + 2 * K + s->heads, after = 2 * s->hidden + 3 * s->inner;
    return s->block * (before + after) + rows * (4 * s->hidden + 3 * A + 2 * K);
}

static Before before_of(const Stack *s, const Part *p, long number, float *room) {
    const StackLayer *l = s->layer + number;
    long A = s->heads * s->size, K = s->kv_heads * s->size, r = p->row;
    const float *x = number ? l[-1].y : s->x;
    return (Before){.gemm = s->gemm, .rows = p->rows, .hidden = s->hidden, .heads = s->heads, .kv_heads = s->kv_heads,
                    .size = s->size, .block = s->block, .threads = s->threads, .eps = s->eps,
                    .x = x + r * s->hidden, .x_stride = s->hidden, .norm = l->norm, .query_weight = l->query_weight,
                    .key_weight = l->key_weight, .value_weight = l->value_weight, .query_norm = l->query_norm,
                    .key_norm = l->key_norm, .cos = s->cos + r * s->size, .sin = s->sin + r * s->size,
                    .scale = l->scale + r, .query_in = l->query_in + r * A, .key_in = l->key_in + r * K,
                    .query = l->query + r * A, .key = l->key + r * K, .value = l->value + r * K, .room = room};
}

static Tree tree_of(const Stack *s, const Part *p, long number) {
    const StackLayer *l = s->layer + number;
    long A = s->heads * s->size, K = s->kv_heads * s->size, r = p->row;
    return (Tree){.query = l->query + r * A, .key = l->key + r * K, .value = l->value + r * K, .query_stride = A,
                  .key_stride = K, .value_stride = K, .runs = s->runs + 3 * p->run, .count = p->runs, .rows = p->rows,
                  .heads = s->heads, .kv_heads = s->kv_heads, .size = s->size, .longest = s->longest, .scale = s->scale,
                  .threads = s->threads, .out = l->out + r * A, .log_sum = l->log_sum + r * s->heads,
                  .gradient_stride = A};
}

// x, out: of the rows that go through
static After after_of(const Stack *s, const Part *p, long number, const float *x, const float *out, float *room) {
    const StackLayer *l = s->layer + number;
    long r = p->taken;
    return (After){.gemm = s->gemm, .rows = p->to_take, .hidden = s->hidden, .attended = s->heads * s->size,
                   .inner = s->inner, .block = s->block, .threads = s->threads, .eps = s->eps, .x = x, .out = out,
                   .x_stride = s->hidden, .out_stride = s->heads * s->size, .out_weight = l->out_weight,
                   .norm = l->second_norm, .gate_weight = l->gate_weight, .up_weight = l->up_weight,
                   .down_weight = l->down_weight, .middle = l->middle + r * s->hidden, .scale = l->second_scale + r,
                   .gate = l->gate + r * s->inner, .up = l->up + r * s->inner, .y = l->y + r * s->hidden, .room = room};
}

// The asked-for rows of a part, [rows, n] -> [asked-for rows, n]
static const float *pick(const Stack *s, const Part *p, const float *from, float *to, long n) {
    if (!p->picks) return from;
    for (long i = 0; i < p->to_take; i++)
        for (long j = 0; j < n; j++) to[i * n + j] = from[(s->asked[p->taken + i] - p->row) * n + j];
    return to;
}

// The inverse; rows that were not asked for become zeros.
static float *put_back(const Stack *s, const Part *p, float *from, float *to, long n) {
    if (!p->picks) return from;
    for (long i = 0; i < p->rows * n; i++) to[i] = 0;
    for (long i = 0; i < p->to_take; i++)
        for (long j = 0; j < n; j++) to[(s->asked[p->taken + i] - p->row) * n + j] += from[i * n + j];
    return to;
}

// Both return 0, or 1 where memory ran out.
int stack_forward(const Stack *s) {
    long H = s->hidden, A = s->heads * s->size;
    float *x_taken = s->room, *out_taken = x_taken + s->widest * H, *room = out_taken + s->widest * A;
    for (long number = 0; number < s->count; number++)
        for (long layer = 0; layer < s->layers; layer++) {
            Part p = part_of(s, number, layer);
            Before b = before_of(s, &p, layer, room);
            before_forward(&b);
            Tree t = tree_of(s, &p, layer);
            if (tree_forward(&t)) return 1;
            After a = after_of(s, &p, layer, pick(s, &p, b.x, x_taken, H), pick(s, &p, t.out, out_taken, A), room);
            after_forward(&a);
        }
    return 0;
}

int stack_backward(const Stack *s) {
    long H = s->hidden, A = s->heads * s->size, K = s->kv_heads * s->size, W = s->widest;
    float *pull = s->room, *of_middle = pull + W * H, *spread = of_middle + W * H;
    float *out_taken = spread + W * H, *of_out = out_taken + W * A, *of_query = of_out + W * A;
    float *of_key = of_query + W * A, *of_value = of_key + W * K, *room = of_value + W * K;
    for (long number = 0; number < s->count; number++) {
        const float *of_y = s->of_y + part_of(s, number, s->layers - 1).taken * H;
        for (long layer = s->layers - 1; layer >= 0; layer--) {
            const StackLayer *l = s->layer + layer;
            Part p = part_of(s, number, layer);
            Tree t = tree_of(s, &p, layer);
            After a = after_of(s, &p, layer, 0, pick(s, &p, t.out, out_taken, A), room);
            a.of_y = of_y, a.of_y_stride = H, a.of_x = of_middle, a.of_out = of_out, a.of_norm = l->of_second_norm;
            a.of_out_weight = l->of_out_weight, a.of_gate_weight = l->of_gate_weight;
            a.of_up_weight = l->of_up_weight, a.of_down_weight = l->of_down_weight, a.keep = number > 0;
            after_backward(&a);
            t.gradient = put_back(s, &p, of_out, of_query, A);
            if (p.picks) { // of_query is written row by row where its gradient was read: swap
                float *other = of_out;
                of_out = of_query, of_query = other;
            }
            t.of_query = of_query, t.of_key = of_key, t.of_value = of_value;
            if (tree_backward(&t)) return 1;
            Before b = before_of(s, &p, layer, room);
            b.of_query = of_query, b.of_key = of_key, b.of_value = of_value;
            b.of_query_stride = A, b.of_key_stride = b.of_value_stride = K;
            b.of_norm = l->of_norm, b.of_query_norm = l->of_query_norm, b.of_key_norm = l->of_key_norm;
            b.of_query_weight = l->of_query_weight, b.of_key_weight = l->of_key_weight;
            b.of_value_weight = l->of_value_weight, b.keep = number > 0;
            b.more = put_back(s, &p, of_middle, spread, H), b.of_x = layer ? pull : s->of_x + p.row * H;
            before_backward(&b);
            of_y = pull;
        }
    }
    return 0;
}
