// The selective scan from the first token to the last: y, the final state, and the state before every `EVERY`th token.
// Blocks of one split of the tokens each, `split` tokens long; `initial` is what each split is given.
// THREADS threads of a block, the first, bring chunks of TOKENS tokens, make of one what the walk reads, and write the
// results of another; the other threads walk the chunk between these two. So one barrier a chunk is enough, and what
// brings and writes runs beside the walk. Walking threads hold S states each; neighbours hold neighbouring channels.
// APART: warps run on four schedulers in turn, and those that bring on the last; warps in between have nothing to do.
// Macros: see scan.cuh, TILE (channels of a block), VECTOR (channels that a thread brings at once), DEPTH (chunks on
// their way), EVERY (0: keep none), AHEAD (whether exponentials are computed a group of tokens ahead), SHARED_BYTES,
// BLOCK (threads of a block), and BLOCKS, how many are to run on a multiprocessor at once.

#include "scan.cuh"

constexpr int RING = DEPTH + 3;  // chunks whose u and z are at hand: until they are written
constexpr int WALKERS = TILE * LANES, NEIGHBOURS = 32 / LANES;  // walking threads; channels of a warp of these
constexpr int GROUP = LANES < 4 ? 4 : LANES > 8 ? 8 : LANES;    // tokens whose sums over states are taken together
constexpr int HELD = GROUP / LANES ? GROUP / LANES : 1, SHARED_BY = LANES / GROUP ? LANES / GROUP : 1;  // sums and lanes
constexpr int UNIT = NEIGHBOURS < 4 ? 4 : NEIGHBOURS > 8 ? 8 : NEIGHBOURS;
constexpr int PITCH = TILE / UNIT % 2 ? TILE : TILE + UNIT;  // of y's rows: stores free of conflicts
using Work = Share<TOKENS, TILE, VECTOR>;
using Place = Steps<TILE>;
using BC = Rows<TOKENS, 2>;
#if __CUDA_ARCH__ >= 1000
constexpr bool LOOKS_AHEAD = AHEAD && !SEGMENTS;  // both walks in one kernel take too many registers there
#else
constexpr bool LOOKS_AHEAD = AHEAD;
#endif
static_assert(TILE % VECTOR == 0 && WALKERS % 32 == 0 && TOKENS % (GROUP * (1 + AHEAD)) == 0 && EVERY % TOKENS == 0);
static_assert(APART ? BLOCK % 128 == 0 && BLOCK >= 4 * THREADS && 3 * BLOCK >= 4 * WALKERS && WALKERS >= TILE
                    : BLOCK == THREADS + WALKERS);

// What the walk of a chunk reads and writes.
struct Chunk {
    alignas(16) float2 steps[TOKENS * Place::PITCH];
    alignas(16) float rows[BC::SIZE];
    alignas(16) float ys[TOKENS * PITCH];
};
struct Shared {
    Chunk chunks[2];
    alignas(16) float skips[TILE], biases[TILE];
    // As they come from memory, each for the thread that brought it.
    Vector<U, VECTOR> u[RING][Work::VECTORS];
    Vector<Z, VECTOR> z[RING][HAS_Z ? Work::VECTORS : 1];
    Vector<DT, VECTOR> dt[DEPTH + 1][Work::VECTORS];
    Vector<BM, 8> B[DEPTH + 1][BC::VECTORS];
    Vector<CM, 8> C[DEPTH + 1][BC::VECTORS];
    signed char marks[RING][TOKENS];
};
static_assert(sizeof(Shared) == SHARED_BYTES);

// A place in a ring of COUNT.
template <int COUNT> struct Slot {
    int at = 0;
    INLINE void advance() { at = at + 1 < COUNT ? at + 1 : 0; }
};

// What a group of tokens does to a thread's states, but for the states themselves.
struct Group {
    float decay[GROUP][S], input[GROUP][S], C[GROUP][S];

    INLINE void read(const Chunk& chunk, int token, int channel, int lane, const float (&decay_rate)[S]) {
        const float2* steps = chunk.steps + token * Place::PITCH + Place::place(channel);
        const float* rows = chunk.rows + token * BC::PITCH + lane * BC::ROW;
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            float2 step = steps[i * Place::PITCH];
            float row[2 * S];
            BC::read(row, rows, i);
#pragma unroll
            for (int n = 0; n < S; n++) {
                Step now(step.x, decay_rate[n]);
                decay[i][n] = now.decay, input[i][n] = step.y * now.scale * row[n], C[i][n] = row[S + n];
            }
        }
    }

    // Moves the states over the tokens; each token's part of y. MARKED: they may restart where `marks` say so.
    template <bool MARKED> INLINE void walk(float (&h)[S], float (&sums)[GROUP], const signed char* marks) const {
#pragma unroll
        for (int i = 0; i < GROUP; i++) {
            bool restarts = MARKED && marks[i] == RESTARTS;
#pragma unroll
            for (int n = 0; n < S; n++) {
                h[n] = fmaf(decay[i][n], restarts ? 0.0f : h[n], input[i][n]);
                sums[i] = n ? fmaf(h[n], C[i][n], sums[i]) : h[n] * C[i][n];
            }
        }
    }
};

// Whether a state restarts within a chunk, asked by all lanes of a warp.
INLINE bool any_restarts(const signed char* marks) {
    bool found = false;
#pragma unroll
    for (int token = threadIdx.x % 32; token < TOKENS; token += 32) found |= marks[token] == RESTARTS;
    return __any_sync(~0u, found);
}

// All threads that have something to do meet.
INLINE void meet() {
    if (APART)
        asm volatile("bar.sync 0, %0;" ::"n"(THREADS + WALKERS) : "memory");
    else
        __syncthreads();
}

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) scan_forward(
    const U* __restrict__ u, i64 u_b, i64 u_t, const DT* __restrict__ dt, i64 dt_b, i64 dt_t, const Z* __restrict__ z,
    i64 z_b, i64 z_t, const BM* __restrict__ B, i64 B_b, i64 B_t, i64 B_g, const CM* __restrict__ C, i64 C_b, i64 C_t,
    i64 C_g, const float* __restrict__ A, const float* __restrict__ D, const float* __restrict__ dt_bias,
    const signed char* __restrict__ marks, const float* __restrict__ initial, U* __restrict__ y, float* __restrict__ final,
    float* __restrict__ starts, i64 split, i64 length_, i64 channels, i64 groups) {
    extern __shared__ float4 dynamic[];
    Shared& shared = *reinterpret_cast<Shared*>(dynamic);
    int splits = gridDim.z, from = int(blockIdx.z * split), all = int(length_), length = int(min(i64(all), from + split));
    int chunks = (length - from + TOKENS - 1) / TOKENS;
    i64 channels_a_group = channels / groups, tiles = (channels_a_group + TILE - 1) / TILE;
    i64 group = blockIdx.x / tiles, first = blockIdx.x % tiles * TILE, batch = blockIdx.y;
    int valid = int(min(i64(TILE), channels_a_group - first));
    first += group * channels_a_group;

    bool brings = APART ? threadIdx.x % 128 >= 96 : threadIdx.x < THREADS;
    int walker = APART ? threadIdx.x / 128 * 96 + threadIdx.x % 128 : threadIdx.x - THREADS;
    if (APART && (brings ? bringer() >= THREADS : walker >= WALKERS)) return;
    for (int c = threadIdx.x; c < TILE; c += BLOCK) {
        shared.skips[c] = D && c < valid ? D[first + c] : 0.0f;
        shared.biases[c] = dt_bias && c < valid ? dt_bias[first + c] : 0.0f;
    }
    meet();
    if (brings) {
        u += batch * u_b + first, dt += batch * dt_b + first, y += batch * all * channels + first;
        if (HAS_Z) z += batch * z_b + first;
        if (SEGMENTS) marks += batch * all;
        B += batch * B_b + group * B_g, C += batch * C_b + group * C_g;
        Slot<RING> fetched, staged, written;
        Slot<DEPTH + 1> fetched_ahead, staged_ahead;
        auto fetch = [&](int chunk) {
            int t0 = from + chunk * TOKENS, of_ring = fetched.at, ahead = fetched_ahead.at;
            fetched.advance(), fetched_ahead.advance();
            if (chunk < chunks) {
                Work::fetch(shared.u[of_ring], u, u_t, t0, length, valid);
                Work::fetch(shared.dt[ahead], dt, dt_t, t0, length, valid);
                if (HAS_Z) Work::fetch(shared.z[of_ring], z, z_t, t0, length, valid);
                BC::fetch(shared.B[ahead], B, B_t, t0, length, marks);
                BC::fetch(shared.C[ahead], C, C_t, t0, length, marks);
            }
            end_of_copies();
        };
        auto stage = [&](int chunk) {
            int t0 = from + chunk * TOKENS, of_ring = staged.at, ahead = staged_ahead.at;
            staged.advance(), staged_ahead.advance();
            Chunk& to = shared.chunks[chunk & 1];
#pragma unroll
            for (int item = 0; item < Work::ITEMS; item++) {
                if (!Work::mine(item)) continue;
                int token = Work::token(item), c = Work::channel(item);
                bool there = t0 + token < length;
                if (SEGMENTS && there) there = marks[t0 + token] != PADDING;
                auto u_raw = shared.u[of_ring][Work::index(item)];
                auto dt_raw = shared.dt[ahead][Work::index(item)];
#pragma unroll
                for (int v = 0; v < VECTOR; v += 2) {
                    float2 pair[2];
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float size = dt_raw.get(v + i) + shared.biases[c + v + i];
                        size = SOFTPLUS ? softplus(size) : size;
                        size = there ? size : 0.0f;
                        pair[i] = {size, input_factor(size, u_raw.get(v + i))};
                        if (SEGMENTS && !there) pair[i].y = 0.0f;
                    }
                    *reinterpret_cast<float4*>(to.steps + token * Place::PITCH + Place::place(c + v)) = {
                        pair[0].x, pair[0].y, pair[1].x, pair[1].y};
                }
            }
            BC::stage(to.rows, shared.B[ahead], shared.C[ahead]);
            if (SEGMENTS)
                for (int token = bringer(); token < TOKENS; token += THREADS)
                    shared.marks[of_ring][token] = t0 + token < length ? marks[t0 + token] : PADDING;
        };
        auto write = [&](int chunk) {
            int t0 = from + chunk * TOKENS, of_ring = written.at;
            written.advance();
#pragma unroll
            for (int item = 0; item < Work::ITEMS; item++) {
                int token = Work::token(item), c = Work::channel(item), t = t0 + token;
                if (!Work::mine(item) || t >= length) continue;
                bool padding = SEGMENTS && shared.marks[of_ring][token] == PADDING;
                auto u_raw = shared.u[of_ring][Work::index(item)];
                auto z_raw = shared.z[of_ring][HAS_Z ? Work::index(item) : 0];
                auto sums = *reinterpret_cast<const Vector<float, VECTOR>*>(shared.chunks[chunk & 1].ys + token * PITCH + c);
                float values[VECTOR];
#pragma unroll
                for (int v = 0; v < VECTOR; v++) {
                    float value = fmaf(shared.skips[c + v], u_raw.get(v), sums.get(v));
                    if (HAS_Z) value *= z_raw.get(v) * sigmoid(z_raw.get(v));
                    values[v] = padding ? 0.0f : value;
                }
                Vector<U, VECTOR> out;
                out.set(values);
                store<ALIGNED>(at_row(y + c, t, channels), out, min(VECTOR, valid - c));
            }
        };
#pragma unroll
        for (int chunk = 0; chunk < DEPTH; chunk++) fetch(chunk);
        for (int chunk = -1; chunk <= chunks; chunk++) {
            wait_for_copies_but<DEPTH - 1>();
            if (chunk + 1 < chunks) stage(chunk + 1);
            fetch(chunk + 1 + DEPTH);
            if (chunk > 0) write(chunk - 1);
            meet();
        }
        return;
    }

    int lane = walker % 32 / NEIGHBOURS, channel = walker / 32 * NEIGHBOURS + walker % NEIGHBOURS;
    bool mine = channel < valid && lane * S < STATES;
    i64 at = (first + channel) * STATES + lane * S, of_row = channels * STATES;
    float h[S], decay_rate[S];
#pragma unroll
    for (int i = 0; i < S; i++) {
        bool there = mine && lane * S + i < STATES;
        decay_rate[i] = there ? scaled(A[at + i]) : 0.0f;
        h[i] = there && initial ? initial[(batch * splits + blockIdx.z) * of_row + at + i] : 0.0f;
    }
    auto save = [&](float* to) {
        if constexpr (S == 8 && ALIGNED) {  // the threads of two channels each store halves of both: whole sectors
            int odd = threadIdx.x % 2;
            Vector<float, 4> of_even, of_odd;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float kept = odd ? h[i + 4] : h[i], given = __shfl_xor_sync(0xffffffff, odd ? h[i] : h[i + 4], 1);
                of_even.words[i] = odd ? given : kept, of_odd.words[i] = odd ? kept : given;
            }
            float* even = to + at + odd * (4 - STATES);
            store<true>(even, of_even, mine);
            store<true>(even + STATES, of_odd, mine);
        } else {
            Vector<float, S> states;
            states.set(h);
            store<STATES % S == 0>(to + at, states, mine ? STATES - lane * S : 0);
        }
    };
    if (EVERY) starts += (batch * ((all + EVERY - 1) / max(EVERY, 1)) + from / max(EVERY, 1)) * of_row;
    meet();
    for (int index = 0; index < chunks; index++) {
        Chunk& chunk = shared.chunks[index & 1];
        const signed char* chunk_marks = shared.marks[index % RING];
        if (EVERY && index % max(EVERY / TOKENS, 1) == 0) {
            save(starts);
            starts += of_row;
        }
        auto finish = [&](float (&sums)[GROUP], int token) {  // over the lanes of a channel
            sum_over_lanes<LANES, NEIGHBOURS>(sums, lane);
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (lane % SHARED_BY == 0) chunk.ys[(token + lane / SHARED_BY * HELD + i) * PITCH + channel] = sums[i];
        };
        // Where none restarts, without a branch: while a group is walked, the one before it is summed, and the next computed.
        if (LOOKS_AHEAD && !(SEGMENTS && any_restarts(chunk_marks))) {
            Group group[2];
            float sums[2][GROUP];
            group[0].read(chunk, 0, channel, lane, decay_rate);
#pragma unroll
            for (int token = 0; token < TOKENS; token += GROUP) {
                int now = token / GROUP % 2;
                if (token + GROUP < TOKENS) group[now ^ 1].read(chunk, token + GROUP, channel, lane, decay_rate);
                group[now].walk<false>(h, sums[now], chunk_marks + token);
                if (token) finish(sums[now ^ 1], token - GROUP);
            }
            finish(sums[TOKENS / GROUP % 2 ^ 1], TOKENS - GROUP);
        } else {
#pragma unroll 1
            for (int token = 0; token < TOKENS; token += GROUP) {
                Group group;
                float sums[GROUP];
                group.read(chunk, token, channel, lane, decay_rate);
                group.walk<SEGMENTS>(h, sums, chunk_marks + token);
                finish(sums, token);
            }
        }
        meet();
    }
    meet();
    if (blockIdx.z + 1 == splits) save(final + batch * of_row);
}
