// The gradients of the selective scan, for each split of the tokens on its own: `carries` is the gradient that the state
// after the split gets from behind it. A block takes tiles of channels one after the other, and a split's chunks of EVERY
// tokens from the last to the first. The states of a chunk are computed again: once on from the chunk's start, keeping
// one in PIECE in shared memory, then piece by piece, the last first, in registers, walking back over each at once.
// Sums over blocks are taken in `partial`: always in the same order. CHAINED: there are more tiles than blocks at once; a
// split then waits for the one behind it, which began long before, and takes the gradient that it got to (`passed`;
// `progress` counts splits that are done, 0 at first).
// THREADS threads bring a piece from memory, make of it what the walk reads, and write its results; the first THREADS
// walk. These are the same, in turn, or with ROLES others, which walk a piece while the next is made and the one before
// written, with registers that the others hand over.
// Macros: see scan.cuh and backward.cuh, and BLOCKS, CHAINED, ROLES, SHARED_BYTES.

#include "scan.cuh"
#include "backward.cuh"

constexpr int WIDTH = 4;                                // channels that a thread brings at once
constexpr int BUFFERS = ROLES ? 2 : 1;                  // pieces that are made, walked or written at once
constexpr int DEPTH = 2, RING = ROLES ? DEPTH + 3 : 2;  // pieces on their way with ROLES; those whose inputs are at hand
constexpr int BRINGING_REGISTERS = 80, WALKING_REGISTERS = 176;  // 128 on average: two blocks of twice THREADS
constexpr int VECTORS = PIECE * CHANNELS / WIDTH, PER_TOKEN = CHANNELS / WIDTH;
static_assert(VECTORS <= THREADS && THREADS % PER_TOKEN == 0);

struct Shared {
    Piece pieces[BUFFERS];
    alignas(16) States kept[PIECES * KC * THREADS];  // the state before each piece, for each thread
    alignas(16) float skips[CHANNELS], biases[CHANNELS];
    Vector<float, WIDTH> sums_skip[VECTORS], sums_bias[VECTORS];
    // What comes from memory while the piece before it is walked. All but dt, B and C are needed until a piece is written.
    Vector<U, WIDTH> u[RING][VECTORS], g[RING][VECTORS];
    Vector<DT, WIDTH> dt[RING][VECTORS];
    Vector<Z, WIDTH> z[RING][HAS_Z ? VECTORS : 1];
    Vector<BM, 8> B[RING][BC::VECTORS];
    Vector<CM, 8> C[RING][BC::VECTORS];
};
static_assert(sizeof(Shared) <= SHARED_BYTES);

// A chunk's pieces in their order: on from the first to the last but one, then back from the last to the first.
struct Item {
    int chunk, pieces, index = 0, slot = 0, buffer = 0;

    INLINE Item(int chunk, int length) : chunk(chunk), pieces((min(EVERY, length - chunk) + PIECE - 1) / PIECE) {}
    INLINE bool back() const { return index >= pieces - 1; }
    INLINE int piece() const { return back() ? 2 * pieces - 2 - index : index; }
    INLINE int begin() const { return chunk + piece() * PIECE; }
    INLINE void advance() {
        slot = slot + 1 < RING ? slot + 1 : 0, buffer = BUFFERS - 1 - buffer;
        if (++index > 2 * pieces - 2) chunk -= EVERY, pieces = PIECES, index = 0;
    }
};

// For each order, the rows of B (and C) from `slots`; by THREADS threads together, each one or a few of the orders.
template <int MATRICES, class Copy, class... T>
INLINE void stage_orders(int me, float* rows, Copy copy, const Vector<T, 8>*... slots) {
    using Of = Rows<PIECE, MATRICES>;
    constexpr int COUNT = PIECE * LANES, AT_ONCE = THREADS / COUNT;
    constexpr int TOGETHER = AT_ONCE > COPIES ? COPIES : AT_ONCE ? AT_ONCE : 1;
#pragma unroll
    for (int begin = 0; begin < COUNT * TOGETHER; begin += THREADS) {
        int item = begin + me, mine = item / COUNT, vector = item % COUNT, matrix = 0;
        if (COUNT * TOGETHER % THREADS && item >= COUNT * TOGETHER) continue;
        ([&] {
            auto part = reinterpret_cast<const Vector<T, S>*>(slots)[vector];
            float row[S];
#pragma unroll
            for (int i = 0; i < S; i++) row[i] = part.get(i);
            to_order(row, mine);
#pragma unroll
            for (int others = 0; others < COPIES; others += TOGETHER) {
                States ordered;
#pragma unroll
                for (int i = 0; i < S; i++) ordered.words[i] = row[i ^ others];
                float* to = rows + copy(others + mine) + vector / LANES * Of::PITCH + vector % LANES * Of::ROW + matrix * S;
                *reinterpret_cast<States*>(to) = ordered;
            }
            matrix++;
        }(), ...);
    }
}

INLINE u32 acquire(const u32* from) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
INLINE void release(u32* to, u32 value) { asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory"); }
INLINE float from_others(const float* from) {  // as it is in memory now
    float value;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(from) : "memory");
    return value;
}

template <class T> INLINE void put(T* to, const float (&values)[WIDTH], int count) {
    Vector<T, WIDTH> vector;
    vector.set(values);
    store<ALIGNED>(to, vector, count);
}

extern "C" __global__ void __launch_bounds__(ROLES ? 2 * THREADS : THREADS, RESIDENT) scan_backward(
    const U* __restrict__ u, i64 u_b, i64 u_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const BM* __restrict__ B, i64 B_b, i64 B_t, i64 B_g, const CM* __restrict__ C, i64 C_b, i64 C_t,
    i64 C_g, const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
    const signed char* __restrict__ marks, const U* __restrict__ grad_y, i64 g_b, i64 g_t,
    const float* __restrict__ starts, const float* __restrict__ carries, U* __restrict__ grad_u, DT* __restrict__ grad_dt,
    Z* __restrict__ grad_z, i64 grad_z_b, i64 grad_z_t, U* __restrict__ y_again, float* __restrict__ grad_A, float* __restrict__ grad_D,
    float* __restrict__ grad_bias, float* __restrict__ grad_initial, float* partial, i64 split_, i64 tiles_a_block,
    float* passed, u32* progress, i64 length_, i64 channels, i64 groups) {
    extern __shared__ float4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);

    int length = int(length_), split = int(split_);
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + CHANNELS - 1) / CHANNELS;
    i64 blocks_a_group = (tiles + tiles_a_block - 1) / tiles_a_block;
    i64 group = blockIdx.x / blocks_a_group, block = blockIdx.x % blocks_a_group, batch = blockIdx.y;
    int splits = gridDim.z, my_split = splits - 1 - blockIdx.z, from = my_split * split, to = min(length, from + split);
    int last = (to - 1) / EVERY * EVERY;
    i64 of_token = groups * STATES, of_matrix = gridDim.y * i64(length) * of_token;
    float* partial_B = partial + block * 2 * of_matrix + batch * length * of_token + group * STATES;
    float* partial_C = partial_B + of_matrix;
    B += batch * B_b + group * B_g, C += batch * C_b + group * C_g;
    if (SEGMENTS) marks += batch * length;
    if (CHAINED) {  // blocks begin in order, z last: nobody waits for one that cannot begin
        if (threadIdx.x == 0)
            while (acquire(progress + blockIdx.y * gridDim.x + blockIdx.x) < blockIdx.z) asm volatile("nanosleep.u32 100;");
        __syncthreads();
    }

    int me = ROLES ? int(threadIdx.x) - THREADS : int(threadIdx.x);
    int my_token = me / PER_TOKEN, my_channel = me % PER_TOKEN * WIDTH;
    bool brings = VECTORS == THREADS || me < VECTORS;
    auto real = [&](int t) { return t < length && !(SEGMENTS && marks[t] == PADDING); };
    auto mark = [&](int t) { return SEGMENTS && t < length ? marks[t] : 0; };
    // What memory has of an item comes into its slot.
    auto fetch = [&](const Item& item, i64 first, int count) {
        if (item.chunk < from) return;  // the last has been
        int slot = item.slot, t = item.begin() + my_token;
        i64 channel = first + my_channel;
        if (brings) {
            int there = real(t) ? count : 0;  // else zeros come
            copy_async<ALIGNED>(&shared.u[slot][me], at_row(u + (batch * u_b + channel), t, u_t), there);
            copy_async<ALIGNED>(&shared.dt[slot][me], at_row(dt + (batch * dt_b + channel), t, dt_t), there);
            if (item.back()) {
                copy_async<ALIGNED>(&shared.g[slot][me], at_row(grad_y + (batch * g_b + channel), t, g_t), there);
                if (HAS_Z) copy_async<ALIGNED>(&shared.z[slot][me], at_row(z + (batch * z_b + channel), t, z_t), there);
            }
        }
#pragma unroll
        for (int begin = 0; begin < OfB::VECTORS; begin += THREADS) {
            int index = begin + me, n = index % (PADDED / 8) * 8, row = item.begin() + index / (PADDED / 8);
            if (OfB::VECTORS % THREADS && index >= OfB::VECTORS) continue;
            int there = real(row) ? min(8, STATES - n) : 0;
            copy_async<ALIGNED>(&shared.B[slot][index], at_row(B + n, row, B_t), there);
            if (item.back()) copy_async<ALIGNED>(&shared.C[slot][index], at_row(C + n, row, C_t), there);
        }
    };
    // What the walk reads of it; what only the way back reads is left out on the way on.
    auto stage = [&](const Item& item) {
        int slot = item.slot;
        Piece& piece = shared.pieces[item.buffer];
        if (brings) {
            bool there = real(item.begin() + my_token);
            auto u_raw = shared.u[slot][me];
            auto dt_raw = shared.dt[slot][me];
            auto bias = *reinterpret_cast<const Vector<float, WIDTH>*>(shared.biases + my_channel);
            float raw[WIDTH], sizes[WIDTH];
#pragma unroll
            for (int v = 0; v < WIDTH; v++) {
                raw[v] = dt_raw.get(v) + bias.get(v), sizes[v] = SOFTPLUS ? softplus(raw[v]) : raw[v];
                sizes[v] = there ? sizes[v] : 0.0f;
            }
#pragma unroll
            for (int v = 0; v < WIDTH; v += 2)
                *reinterpret_cast<float4*>(piece.steps + my_token * Place::PITCH + Place::place(my_channel + v)) = {
                    sizes[v], input_factor(sizes[v], u_raw.get(v)), sizes[v + 1], input_factor(sizes[v + 1], u_raw.get(v + 1))};
            if (item.back()) {
                auto g_raw = shared.g[slot][me];
                auto z_raw = shared.z[slot][HAS_Z ? me : 0];
                float slopes[WIDTH], of_raw[WIDTH];
                Vector<float, WIDTH> open;
#pragma unroll
                for (int v = 0; v < WIDTH; v++) {
                    float gate = HAS_Z ? z_raw.get(v) : 0.0f;
                    open.words[v] = HAS_Z ? sigmoid(gate) : 0.0f;
                    slopes[v] = g_raw.get(v) * (HAS_Z ? gate * open.get(v) : 1.0f);
                    of_raw[v] = SOFTPLUS ? sigmoid(raw[v]) : 1.0f;
                }
#pragma unroll
                for (int v = 0; v < WIDTH; v += 2)
                    *reinterpret_cast<float4*>(piece.slopes + my_token * Place::PITCH + Place::place(my_channel + v)) = {
                        slopes[v], of_raw[v], slopes[v + 1], of_raw[v + 1]};
                if (HAS_Z) *reinterpret_cast<Vector<float, WIDTH>*>(piece.gates + my_token * CHANNELS + my_channel) = open;
            }
        }
        if (item.back())
            stage_orders<2>(me, piece.rows, copy_of_BC, shared.B[slot], shared.C[slot]);
        else
            stage_orders<1>(me, piece.rows, copy_of_B, shared.B[slot]);
        if (SEGMENTS && me < PIECE) piece.marks[me] = item.begin() + me < length ? marks[item.begin() + me] : PADDING;
    };
    // The gradients of a piece that has been walked back over. `more`: the block has added to those of B and C before.
    auto write = [&](const Item& item, i64 first, int count, bool more) {
        int slot = item.slot, t = item.begin() + my_token;
        const Piece& piece = shared.pieces[item.buffer];
        if (brings && t < length && count > 0) {
            auto u_raw = shared.u[slot][me];
            auto g_raw = shared.g[slot][me];
            auto z_raw = shared.z[slot][HAS_Z ? me : 0];
            auto vector = [](const float* from) { return *reinterpret_cast<const Vector<float, WIDTH>*>(from); };
            int index = my_token * PITCH + my_channel;
            auto skip = vector(shared.skips + my_channel), of_u = vector(piece.of_input + index), of_dt = vector(piece.of_size + index);
            auto open = vector(piece.gates + (HAS_Z ? my_token * CHANNELS + my_channel : 0)), y = vector(piece.ys + (HAS_Z ? index : 0));
            auto sum_skip = shared.sums_skip[me], sum_bias = shared.sums_bias[me];
            float values_u[WIDTH], values_dt[WIDTH], values_z[WIDTH], values_y[WIDTH];
            bool padding = mark(t) == PADDING;
#pragma unroll
            for (int v = 0; v < WIDTH; v++) {
                int at = my_token * Place::PITCH + Place::place(my_channel + v);
                float input = u_raw.get(v), size = piece.steps[at].x, slope = piece.slopes[at].of_y;
                if (HAS_Z) {
                    float gate = z_raw.get(v), opened = fmaf(skip.get(v), input, y.get(v)) * open.get(v);
                    values_z[v] = g_raw.get(v) * opened * fmaf(gate, 1.0f - open.get(v), 1.0f);
                    values_y[v] = padding ? 0.0f : opened * gate;
                }
                values_u[v] = fmaf(skip.get(v), slope, DISCRETIZATION == 0 ? of_u.get(v) * size : of_u.get(v));
                values_dt[v] = DISCRETIZATION == 0 ? fmaf(input, of_u.get(v), LN2 * of_dt.get(v)) : of_dt.get(v);
                if (SOFTPLUS) values_dt[v] *= piece.slopes[at].of_raw;
                if (padding) values_u[v] = values_dt[v] = values_z[v] = input = 0.0f;
                sum_skip.words[v] = fmaf(slope, input, sum_skip.get(v));
                sum_bias.words[v] += values_dt[v];
            }
            shared.sums_skip[me] = sum_skip, shared.sums_bias[me] = sum_bias;
            i64 channel = first + my_channel, out = batch * length * channels + channel;
            put(at_row(grad_u + out, t, channels), values_u, count);
            put(at_row(grad_dt + out, t, channels), values_dt, count);
            if (HAS_Z) put(at_row(grad_z + (batch * grad_z_b + channel), t, grad_z_t), values_z, count);
            if (HAS_Z && y_again) put(at_row(y_again + out, t, channels), values_y, count);
        }
#pragma unroll
        for (int begin = 0; begin < PIECE * 2 * PADDED; begin += 2 * THREADS) {
            int index = begin + 2 * me, token = index / (2 * PADDED), n = index % PADDED;
            if (PIECE * PADDED % THREADS && index >= PIECE * 2 * PADDED) continue;
            if (item.begin() + token >= length || n >= STATES) continue;
            float2 sum = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                auto part = *reinterpret_cast<const float2*>(piece.of_matrices + w * PIECE * 2 * PADDED + index);
                sum.x += part.x, sum.y += part.y;
            }
            if (mark(item.begin() + token) == PADDING) sum = {0.0f, 0.0f};
            float* target = at_row((index / PADDED % 2 ? partial_C : partial_B) + n, item.begin() + token, of_token);
            if (more) {  // only this block adds there: the order is that of its tiles
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(sum.x));
                if (n + 1 < STATES) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target + 1), "f"(sum.y));
            } else if (STATES % 2 == 0) {
                asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(target), "f"(sum.x), "f"(sum.y));
            } else {
                target[0] = sum.x;
                if (n + 1 < STATES) target[1] = sum.y;
            }
        }
    };

    i64 first;
    int valid, count;  // channels of the tile, and of those that this thread brings
    auto begin_tile = [&](i64 tile) {
        first = group * channels_a_group + tile * CHANNELS;
        valid = int(min(i64(CHANNELS), channels_a_group - tile * CHANNELS)), count = min(WIDTH, valid - my_channel);
    };
    auto begin_bringing = [&] {
        for (int c = me; c < CHANNELS; c += THREADS) {
            shared.skips[c] = D && c < valid ? D[first + c] : 0.0f;
            shared.biases[c] = dt_bias && c < valid ? dt_bias[first + c] : 0.0f;
        }
        if (brings) shared.sums_skip[me] = shared.sums_bias[me] = {};
    };
    auto end_bringing = [&] {
        for (int index = me; index < 2 * CHANNELS; index += THREADS) {
            int c = index % CHANNELS;
            auto* sums = reinterpret_cast<const float*>(index < CHANNELS ? shared.sums_skip : shared.sums_bias);
            float sum = 0.0f;
#pragma unroll
            for (int token = 0; token < PIECE; token++) sum += sums[token * CHANNELS + c];
            if (c >= valid) continue;
            (index < CHANNELS ? grad_D : grad_bias)[(batch * splits + my_split) * channels + first + c] = sum;
        }
    };
    auto start_of = [&](int chunk) {
        return starts + i64(int(blockIdx.y) * ((length + EVERY - 1) / EVERY) + chunk / EVERY) * channels * STATES;
    };
    auto begin_walking = [&](Walk& walk) {
        walk.begin_tile(first, valid, A, [&](int at) {
            i64 here = (CHAINED ? batch : batch * splits + my_split) * channels * STATES + at;
            if (CHAINED && my_split + 1 < splits) return from_others(passed + here);
            return carries ? carries[here] : 0.0f;
        });
        walk.bring_start(start_of(last), valid);
    };
    auto walk_over = [&](Walk& walk, const Item& item) {
        Piece& piece = shared.pieces[item.buffer];
        if (item.index == 0) walk.begin_chunk();
        if (item.back()) {
            if (item.piece() == 0 && item.chunk > from) walk.bring_start(start_of(item.chunk - EVERY), valid);
            walk.back(piece, item.piece());
        } else {
            walk.on(piece);
            walk.keep(item.piece() + 1);
        }
    };
    auto end_walking = [&](const Walk& walk) {
        i64 split_at = (batch * splits + my_split) * channels * STATES, batch_at = batch * channels * STATES;
#pragma unroll
        for (int k = 0; k < KC; k++)
#pragma unroll
            for (int i = 0; i < S; i++) {
                int at = walk.at[k] + walk.state(i);
                if (walk.state(i) >= STATES || walk.place[k] >= valid) continue;
                grad_A[split_at + at] = walk.sum_A[k][i];
                if (CHAINED && my_split > 0) passed[batch_at + at] = walk.carry[k][i];
                if (my_split == 0) grad_initial[batch_at + at] = walk.carry[k][i];
            }
    };

    if constexpr (ROLES) {  // each interval ends with a barrier: one item is made, one is walked and one is written
        begin_tile(block);
        if (threadIdx.x >= THREADS) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BRINGING_REGISTERS));
            begin_bringing();
            Item fetched(last, length), staged = fetched, written = fetched;
            auto fetch_next = [&] {
                fetch(fetched, first, count);
                fetched.advance();
                end_of_copies();
            };
#pragma unroll
            for (int i = 0; i < DEPTH; i++) fetch_next();
            wait_for_copies_but<DEPTH - 1>();
            __syncthreads();
            for (int interval = -1; written.chunk >= from; interval++) {
                if (interval > 0) {
                    if (written.back()) write(written, first, count, false);
                    written.advance();
                }
                if (staged.chunk >= from) stage(staged);
                staged.advance();
                fetch_next();
                wait_for_copies_but<DEPTH - 1>();
                __syncthreads();
            }
            end_bringing();
        } else {
            asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WALKING_REGISTERS));
            Walk walk(shared.kept);
            begin_walking(walk);
            __syncthreads();
            __syncthreads();
            for (Item item(last, length); item.chunk >= from; item.advance()) {
                if (item.index == 0) wait_for_copies();
                walk_over(walk, item);
                __syncthreads();
            }
            __syncthreads();
            end_walking(walk);
        }
    } else {
        for (i64 tile = block * tiles_a_block; tile < min(tiles, (block + 1) * tiles_a_block); tile++) {
            begin_tile(tile);
            begin_bringing();
            Walk walk(shared.kept);
            auto finish = [] {  // all of the next item is there, and all of this one has been walked
                wait_for_copies();
                __syncthreads();
            };
            Item item(last, length), next = item;
            fetch(item, first, count);
            begin_walking(walk);
            finish();
            while (item.chunk >= from) {
                stage(item);
                __syncthreads();
                next.advance();
                fetch(next, first, count);
                walk_over(walk, item);
                finish();
                if (item.back()) write(item, first, count, tile > block * tiles_a_block);
                item = next;
            }
            __syncthreads();
            end_bringing();
            __syncthreads();
            end_walking(walk);
        }
    }
    if (CHAINED) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) release(progress + blockIdx.y * gridDim.x + blockIdx.x, blockIdx.z + 1);
    }
}

// Writes the sums of `rows` rows, `stride` numbers apart; a thread makes four of them, or one without alignment.
template <class T> INLINE void sum_rows(T* to, const float* from, i64 rows, i64 stride) {
    constexpr int COUNT = ALIGNED ? 4 : 1;
    Vector<float, 4> part, sums = {};
    for (i64 row = 0; row < rows; row++) {
        load<ALIGNED>(part, from + row * stride, COUNT);
#pragma unroll
        for (int v = 0; v < COUNT; v++) sums.words[v] += part.get(v);
    }
    Vector<T, 4> vector;
    vector.set(sums.words);
    store<ALIGNED>(to, vector, COUNT);
}

// The sums over blocks of the gradients of B and C, whose rows of STATES numbers are `apart`; over rows and splits of those of A,
// times `factors`, D and dt_bias.
extern "C" __global__ void __launch_bounds__(THREADS) scan_sums(
    const float* __restrict__ partial, i64 blocks, const float* __restrict__ of_A, const float* __restrict__ of_channels,
    i64 rows, BM* __restrict__ grad_B, CM* __restrict__ grad_C, float* __restrict__ grad_A, float* __restrict__ grad_D,
    float* __restrict__ grad_bias, i64 of_matrix, i64 channels, i64 apart, const float* __restrict__ factors) {
    i64 at = (blockIdx.x * i64(THREADS) + threadIdx.x) * (ALIGNED ? 4 : 1), states = channels * STATES;
    if (at < 2 * of_matrix) {
        bool second = at >= of_matrix;
        i64 inside = at - second * of_matrix, place = inside / STATES * apart + inside % STATES;
        if (second) return sum_rows(grad_C + place, partial + at, blocks, 2 * of_matrix);
        return sum_rows(grad_B + place, partial + at, blocks, 2 * of_matrix);
    }
    if ((at -= 2 * of_matrix) < states) {
        sum_rows(grad_A + at, of_A + at, rows, states);
        for (int v = 0; factors && v < (ALIGNED ? 4 : 1); v++) grad_A[at + v] *= factors[at + v];
        return;
    }
    if ((at -= states) < channels) return sum_rows(grad_D + at, of_channels + at, rows, channels);
    if ((at -= channels) < channels) return sum_rows(grad_bias + at, of_channels + rows * channels + at, rows, channels);
}
