// One token of one row through a stack of Mamba-1 blocks, h + Mamba1(RMSNorm(h)), in one kernel.
//
// A block a multiprocessor. Each warp has a ring in shared memory, through which the weights it will need stream without a
// pause, across phases and layers: so memory is busy while blocks wait for each other. What passes between blocks carries
// the number of its layer, counted through all launches, in the same 8 bytes: who needs it reads until the number is right.
//
// A layer has four phases: in_proj, conv; x_proj; dt_proj, states; out_proj. A block keeps its channels through the first
// and third, its places of the residual stream through all layers.
//
// Macros: W type of the weights, H of the residual stream, P of norms and conv, S of the conv's state; HIDDEN, INNER, RANK,
// TAPS, LAYERS; CHUNK of an input row, that a warp takes at a time; DEPTH of the rings; BLOCKS; SHARED bytes; EPSILON;
// DISCRETIZATION: 0 mamba, 1 zoh, 2 bilinear.

#include "step.cuh"
#include "barrier.cuh"
#include "recurrence.cuh"
#include "published.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, STATES = 16, LANES = 4, SELECTION = RANK + 2 * STATES;
constexpr int IN_PIECES = HIDDEN / CHUNK, OUT_PIECES = INNER / CHUNK, LOADS = CHUNK / 256, SLOT = 4 * CHUNK;
constexpr int CHANNELS = (INNER + BLOCKS - 1) / BLOCKS;  // of a block, at most
constexpr int SELECTED = (SELECTION / 2 + BLOCKS - 1) / BLOCKS, PLACES = (HIDDEN / 2 + BLOCKS - 1) / BLOCKS;  // pairs of outputs
constexpr int DT_LOADS = (RANK + 8 * LANES - 1) / (8 * LANES);

constexpr int OTHERS = SELECTED > PLACES ? SELECTED : PLACES;
constexpr int UNITS = CHANNELS * IN_PIECES > OTHERS * OUT_PIECES ? CHANNELS * IN_PIECES : OTHERS * OUT_PIECES;
static_assert(sizeof(W) == 2 && CHUNK % 256 == 0 && WARPS % OUT_PIECES == 0 && WARPS % IN_PIECES == 0 && RANK % 8 == 0);
static_assert(CHANNELS * LANES <= THREADS && 2 * PLACES <= THREADS && INNER % CHUNK == 0 && HIDDEN % CHUNK == 0);

struct Layer {
    const P* norm;
    const W* in_proj;
    const P *conv_weight, *conv_bias;
    const W *x_proj, *dt_proj;
    const float *dt_bias, *A_log, *D;
    const W* out_proj;
    S* conv_state;
    float* ssm_state;
};

struct Memory {  // shared
    alignas(16) float x[INNER];
    float parts[UNITS][2], selection[SELECTION], token[CHANNELS], gate[CHANNELS], squares[WARPS];
    u64 arrived[WARPS][DEPTH];
    Layer layers[LAYERS];
    alignas(128) char ring[WARPS][DEPTH][SLOT];
};

// COUNT numbers that other blocks publish, once they are there: use(i, k, x[k], x[k + 1]), the i-th call of a thread.
template <int COUNT, class Use> INLINE void gather(const uint2* from, u32 epoch, Use use) {
    constexpr int EACH = (COUNT / 2 + THREADS - 1) / THREADS;
    uint4 got[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) got[i].y = got[i].w = epoch - 1;
    bool missing = true;
    while (missing) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int k = i * THREADS + threadIdx.x;
            if (k < COUNT / 2 && (got[i].y != epoch || got[i].w != epoch)) got[i] = two_published(from + 2 * k);
        }
        missing = false;
#pragma unroll
        for (int i = 0; i < EACH; i++) missing |= i * THREADS + threadIdx.x < COUNT / 2 && (got[i].y != epoch || got[i].w != epoch);
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int k = i * THREADS + threadIdx.x;
        if (k < COUNT / 2) use(i, 2 * k, __uint_as_float(got[i].x), __uint_as_float(got[i].z));
    }
}

// Has numbers brought to L2: from memory they would come behind all that the rings have ordered.
template <class T> INLINE void bring(const T* from, int count) {
    const char *begin = reinterpret_cast<const char*>(from), *last = reinterpret_cast<const char*>(from + count) - 1;
    for (const char* at = begin + threadIdx.x * 128; at < last + 128; at += THREADS * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(at < last ? at : last));
}

// A warp's ring: weights in the order in which it will multiply them, over all phases and layers.
struct Stream {
    Memory& memory;
    const u64 once;  // a cache policy
    const int warp, lane, first_channel, channels, first_selected, selected, first_place, places;
    int layer = 0, phase = 0, unit, to = 0, at = 0;
    u32 turn = 0;

    INLINE int units(int phase) const { return phase == 0 ? channels * IN_PIECES : (phase == 1 ? selected : places) * OUT_PIECES; }
    INLINE void skip() {
        while (unit >= units(phase)) {
            unit = warp;
            if (++phase == 3) {
                phase = 0;
                if (++layer == LAYERS) break;
            }
        }
    }
    INLINE void fetch() {
        if (layer == LAYERS) return;
        const Layer& of = memory.layers[layer];
        const int pieces = phase == 0 ? IN_PIECES : OUT_PIECES, pair = unit / pieces, piece = unit % pieces;
        const W* weight = phase == 0 ? of.in_proj : phase == 1 ? of.x_proj : of.out_proj;
        const i64 row = phase == 0 ? first_channel + pair : 2 * ((phase == 1 ? first_selected : first_place) + pair);
        const i64 size = pieces * CHUNK;
        const W *first = weight + row * size + piece * CHUNK, *second = first + (phase == 0 ? INNER * i64(HIDDEN) : size);
        if (lane == 0) {
            const u32 slot = shared_place(memory.ring[warp][to]);
            arrive_with(&memory.arrived[warp][to], SLOT);
            copy(slot, first, &memory.arrived[warp][to]), copy(slot + 2 * CHUNK, second, &memory.arrived[warp][to]);
        }
        to = to + 1 == DEPTH ? 0 : to + 1;
        unit += WARPS;
        skip();
    }
    // They are read once: what blocks tell each other is to stay in L2.
    INLINE void copy(u32 to, const W* from, const void* arrived) const {
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                     ::"r"(to), "l"(from), "r"(2 * CHUNK), "r"(shared_place(arrived)), "l"(once) : "memory");
    }
    // The products of x with this block's rows: two sums a unit, of a piece each.
    template <int PIECES> INLINE void multiply(int units) {
        float x[LOADS][8];
#pragma unroll
        for (int i = 0; i < LOADS; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float4 four = *reinterpret_cast<const float4*>(&memory.x[warp % PIECES * CHUNK + i * 256 + lane * 8 + half * 4]);
                x[i][4 * half] = four.x, x[i][4 * half + 1] = four.y, x[i][4 * half + 2] = four.z, x[i][4 * half + 3] = four.w;
            }
        for (int unit = warp; unit < units; unit += WARPS) {
            wait_for(&memory.arrived[warp][at], turn);
            const u32 slot = shared_place(memory.ring[warp][at]) + lane * 16;
            float sums[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 words[LOADS];
#pragma unroll
                for (int i = 0; i < LOADS; i++) words[i] = load_shared(slot + j * 2 * CHUNK + i * 512);
                float even = 0.0f, odd = 0.0f;
#pragma unroll
                for (int i = 0; i < LOADS; i++) {
                    float w[8];
                    unpack(W{}, words[i], w);
#pragma unroll
                    for (int v = 0; v < 8; v += 2) even = fmaf(w[v], x[i][v], even), odd = fmaf(w[v + 1], x[i][v + 1], odd);
                }
                sums[j] = even + odd;
            }
            __syncwarp();
            if (++at == DEPTH) at = 0, turn ^= 1;
            fetch();
            sum_over_lanes<32, 1>(sums, lane);
            if (lane % 16 == 0) memory.parts[unit][lane / 16] = sums[0];
        }
    }
    template <int PIECES> INLINE float sum(int pair, int j) const {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PIECES; i++) sum += memory.parts[pair * PIECES + i][j];
        return sum;
    }
};

static_assert(sizeof(Memory) <= SHARED);

extern "C" __global__ void __launch_bounds__(THREADS, 1) stack(
    const Layer* layers, H* hidden, uint2* of_x, uint2* of_selection, uint2* of_y, uint2* of_hidden, u32* epochs) {
    extern __shared__ float4 dynamic[];
    Memory& memory = *reinterpret_cast<Memory*>(dynamic);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, block = blockIdx.x;
    const int first_channel = block * INNER / BLOCKS, channels = (block + 1) * INNER / BLOCKS - first_channel;
    const int first_selected = block * (SELECTION / 2) / BLOCKS, selected = (block + 1) * (SELECTION / 2) / BLOCKS - first_selected;
    const int first_place = block * (HIDDEN / 2) / BLOCKS, places = (block + 1) * (HIDDEN / 2) / BLOCKS - first_place;

    for (int i = tid; i < int(LAYERS * sizeof(Layer) / 8); i += THREADS)
        reinterpret_cast<u64*>(memory.layers)[i] = reinterpret_cast<const u64*>(layers)[i];
    if (lane < DEPTH) set_barrier(&memory.arrived[warp][lane], 1);
    barriers_are_set();
    __syncthreads();
    u64 once;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    auto bring_first = [&](const Layer& of) {  // what the first phase reads, and the third
        bring(of.norm + 2 * first_place, 2 * places);
        bring(of.conv_weight + first_channel * TAPS, channels * TAPS);
        if (of.conv_bias) bring(of.conv_bias + first_channel, channels);
        for (int t = 0; t + 1 < TAPS; t++) bring(of.conv_state + t * INNER + first_channel, channels);
    };
    auto bring_third = [&](const Layer& of) {
        bring(of.ssm_state + first_channel * STATES, channels * STATES);
        bring(of.A_log + first_channel * STATES, channels * STATES);
        bring(of.dt_proj + i64(first_channel) * RANK, channels * RANK);
        bring(of.dt_bias + first_channel, channels);
        bring(of.D + first_channel, channels);
    };
    bring_first(memory.layers[0]);
    Stream stream{memory, once, warp, lane, first_channel, channels, first_selected, selected, first_place, places};
    stream.unit = warp;
    stream.skip();
    for (int i = 0; i < DEPTH; i++) stream.fetch();
    const u32 base = load_word(epochs);
    float residual = tid < 2 * places ? fresh(hidden + 2 * first_place + tid) : 0.0f;

    for (int layer = 0; layer < LAYERS; layer++) {
        const Layer& of = memory.layers[layer];
        const u32 epoch = base + 1 + layer;
        {   // in_proj, and conv
            bring_third(of);
            float window[TAPS], taps[TAPS], offset = 0.0f;
            const int channel = first_channel + tid;
            S* state = of.conv_state + channel;
            if (tid < channels) {
#pragma unroll
                for (int t = 0; t < TAPS; t++) taps[t] = value(of.conv_weight[channel * TAPS + t]);
#pragma unroll
                for (int t = 0; t + 1 < TAPS; t++) window[t] = fresh(state + t * INNER);
                if (of.conv_bias) offset = value(of.conv_bias[channel]);
            }
            constexpr int EACH = (HIDDEN / 2 + THREADS - 1) / THREADS;
            float norms[EACH][2], squares = 0.0f;
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int k = 2 * (i * THREADS + tid);
                if (k < HIDDEN) norms[i][0] = value(of.norm[k]), norms[i][1] = value(of.norm[k + 1]);
            }
            auto take = [&](int i, int k, float a, float b) {
                squares = fmaf(a, a, fmaf(b, b, squares));
                *reinterpret_cast<float2*>(&memory.x[k]) = {a * norms[i][0], b * norms[i][1]};
            };
            if (layer == 0) {
#pragma unroll
                for (int i = 0; i < EACH; i++) {
                    int k = 2 * (i * THREADS + tid);
                    if (k < HIDDEN) take(i, k, fresh(hidden + k), fresh(hidden + k + 1));
                }
            } else {
                gather<HIDDEN>(of_hidden, epoch - 1, take);
            }
            squares = sum_of_warp(squares);
            if (lane == 0) memory.squares[warp] = squares;
            __syncthreads();
            stream.multiply<IN_PIECES>(channels * IN_PIECES);
            __syncthreads();
            if (tid < channels) {
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < WARPS; i++) sum += memory.squares[i];
                const float factor = rsqrtf(sum / HIDDEN + EPSILON);
                const float raw = stream.sum<IN_PIECES>(tid, 0) * factor;
                float x = fmaf(taps[TAPS - 1], raw, offset);
#pragma unroll
                for (int t = 0; t + 1 < TAPS; t++) x = fmaf(taps[t], window[t], x);
                x = silu(x);
                publish(of_x + channel, x, epoch);
                memory.token[tid] = x, memory.gate[tid] = silu(stream.sum<IN_PIECES>(tid, 1) * factor);
#pragma unroll
                for (int t = 0; t + 1 < TAPS; t++) put(state + t * INNER, t + 2 < TAPS ? window[t + 1] : raw);
            }
        }
        const int own = tid / LANES, part = tid % LANES;
        const bool there = own < channels;
        const i64 channel = first_channel + (there ? own : 0);
        // For the third phase, while the second waits.
        float4* state = reinterpret_cast<float4*>(of.ssm_state) + channel * LANES + part;
        const uint4 h = early16(state), rates = early16(of.A_log + channel * STATES + part * 4);
        const float skip = early(of.D + channel), bias = early(of.dt_bias + channel);
        uint4 dt_words[DT_LOADS] = {};
#pragma unroll
        for (int q = 0; q < DT_LOADS; q++)
            if ((q * LANES + part) * 8 < RANK) dt_words[q] = early16(of.dt_proj + channel * RANK + (q * LANES + part) * 8);

        if (selected > 0) {  // x_proj
            gather<INNER>(of_x, epoch, [&](int, int k, float a, float b) { *reinterpret_cast<float2*>(&memory.x[k]) = {a, b}; });
            __syncthreads();
            stream.multiply<OUT_PIECES>(selected * OUT_PIECES);
            __syncthreads();
            if (tid < 2 * selected)
                publish(of_selection + 2 * first_selected + tid, stream.sum<OUT_PIECES>(tid / 2, tid % 2), epoch);
        }
        {   // dt_proj, and the states
            if (layer + 1 < LAYERS) bring_first(memory.layers[layer + 1]);
            gather<SELECTION>(of_selection, epoch, [&](int, int k, float a, float b) { *reinterpret_cast<float2*>(&memory.selection[k]) = {a, b}; });
            __syncthreads();
            float step = 0.0f;
#pragma unroll
            for (int q = 0; q < DT_LOADS; q++) {
                const int k = (q * LANES + part) * 8;
                float w[8];
                unpack(W{}, dt_words[q], w);
                if (k < RANK) {
#pragma unroll
                    for (int v = 0; v < 8; v++) step = fmaf(w[v], memory.selection[k + v], step);
                }
            }
            step += __shfl_xor_sync(0xffffffff, step, 1);
            step += __shfl_xor_sync(0xffffffff, step, 2);
            step = softplus(step + bias);
            const float token = there ? memory.token[own] : 0.0f;
            const float old[4] = {__uint_as_float(h.x), __uint_as_float(h.y), __uint_as_float(h.z), __uint_as_float(h.w)};
            const u32 rate[4] = {rates.x, rates.y, rates.z, rates.w};
            float now[4], y = 0.0f;
#pragma unroll
            for (int n = 0; n < 4; n++) {
                Discrete d = discretize(step, -exp2_(LOG2E * __uint_as_float(rate[n])));
                now[n] = fmaf(d.decay, old[n], d.input * token * memory.selection[RANK + 4 * part + n]);
                y = fmaf(now[n], memory.selection[RANK + STATES + 4 * part + n], y);
            }
            y += __shfl_xor_sync(0xffffffff, y, 1);
            y += __shfl_xor_sync(0xffffffff, y, 2);
            if (there && part == 0) publish(of_y + channel, fmaf(skip, token, y) * memory.gate[own], epoch);
            if (there) *state = {now[0], now[1], now[2], now[3]};
        }
        {   // out_proj
            gather<INNER>(of_y, epoch, [&](int, int k, float a, float b) { *reinterpret_cast<float2*>(&memory.x[k]) = {a, b}; });
            __syncthreads();
            stream.multiply<OUT_PIECES>(places * OUT_PIECES);
            __syncthreads();
            if (tid < 2 * places) {
                H* to = hidden + 2 * first_place + tid;
                H rounded;
                put(&rounded, residual + stream.sum<OUT_PIECES>(tid / 2, tid % 2));
                residual = value(rounded);
                publish(of_hidden + 2 * first_place + tid, residual, epoch);
                if (layer + 1 == LAYERS) put(to, residual);
            }
        }
    }
    if (block == 0 && tid == 0) *epochs = base + LAYERS;  // all others have read it
}
