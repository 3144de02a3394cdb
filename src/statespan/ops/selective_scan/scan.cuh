// What the kernels of the selective scan share. A thread holds STATES_A_THREAD neighbouring states of a channel; the
// LANES threads of a channel are in one warp. A block works through the tokens TOKENS at a time: it brings a chunk of the
// inputs into shared memory as float32, walks it with the state in registers, and writes its results with the threads
// that brought it, THREADS of them.
//
// Macros: U, DT, Z, BM, CM (scalar types of u, dt, z, B, C), STATES and PADDED (states, and the power of two above),
// STATES_A_THREAD, THREADS, TOKENS, ALIGNED, HAS_Z, SOFTPLUS, SEGMENTS, DISCRETIZATION (0 mamba, 1 zoh, 2 bilinear), and
// APART: whether the threads that bring are every fourth warp, and so have one of four schedulers to themselves.

constexpr int S = STATES_A_THREAD, LANES = PADDED / S;
static_assert(S <= 8 && LANES <= 32 && PADDED % 8 == 0);
constexpr int RESTARTS = 1, PADDING = 2;

// Blocks that are to fit a multiprocessor; on newer kinds the compiler needs more registers for the same code.
#if __CUDA_ARCH__ >= 1000
constexpr int RESIDENT = BLOCKS > 2 ? BLOCKS - 1 : BLOCKS;
#else
constexpr int RESIDENT = BLOCKS;
#endif

// A thread's number among those that bring.
INLINE u32 bringer() { return APART ? threadIdx.x / 128 * 32 + threadIdx.x % 32 : threadIdx.x; }

// A as the walk uses it: exp(dt A) = 2^(dt A log2 e).
INLINE float scaled(float A) { return DISCRETIZATION == 0 ? A * LOG2E : A; }

// (expm1(x) / x - exp(x)) / -x for the derivative of zoh's Bbar by A; a series where the difference would cancel.
INLINE float zoh_curvature(float x, float a) {
    if (fabsf(x) > 0.5f) return (x * a - expm1f(x)) / (x * x);
    float series = fmaf(x, 1.0f / 45360, 1.0f / 5760);
    series = fmaf(x, series, 1.0f / 840);
    series = fmaf(x, series, 1.0f / 144);
    series = fmaf(x, series, 1.0f / 30);
    series = fmaf(x, series, 1.0f / 8);
    series = fmaf(x, series, 1.0f / 3);
    return fmaf(x, series, 1.0f / 2);
}

// One step of one state: Abar, what the input B is multiplied with, and for the backward their derivatives.
// step: dt, and u times what is common to all states (dt for mamba, 1 else).
struct Step {
    float decay, scale;  // h = decay h + scale u B
    float decay_x;       // d decay / d x, x = dt A
    float scale_dt, scale_A;

    INLINE Step(float dt, float A) {
        if (DISCRETIZATION == 0) {
            decay = exp2_(dt * A);
            scale = 1.0f;
        } else if (DISCRETIZATION == 1) {
            float x = dt * A;
            decay = decay_x = scale_dt = exp2_(x * LOG2E);
            scale = A == 0.0f ? dt : expm1f(x) / A;
            scale_A = dt * dt * zoh_curvature(x, decay);
        } else {
            float x = dt * A, w = reciprocal(1.0f - 0.5f * x);
            decay = (1.0f + 0.5f * x) * w;
            scale = dt * w;
            decay_x = scale_dt = w * w;
            scale_A = 0.5f * dt * dt * w * w;
        }
    }
};

// The second number of a step, see Step.
INLINE float input_factor(float dt, float u) { return DISCRETIZATION == 0 ? dt * u : u; }

// Where dt and its factor of channel c of a token stand in shared memory. Threads store 8 channels of a token with four
// wide stores; pieces are permuted and rows padded so that neither they nor the walk meet in a bank.
template <int CHANNELS> struct Steps {
    static constexpr int PITCH = CHANNELS + (CHANNELS == 32 ? 4 : CHANNELS < 32 ? 2 : 0);  // float2 of a token
    static INLINE int place(int c) { return c / 8 * 8 + ((c % 8 / 2) ^ (c / 16 % 4)) * 2 + c % 2; }
};

// The element `t` strides behind; rows are close enough that a stride in bytes has 32 bits.
template <class T> INLINE T* at_row(T* from, int t, i64 stride) {
    i64 result;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(result) : "r"(t), "r"(int(stride) * int(sizeof(T))), "l"(from));
    return reinterpret_cast<T*>(result);
}

// A chunk of B and C, or of one of them, in shared memory: for each token and lane, the lane's states of the first, then
// of the second, so that a thread reads both with wide loads. The padding of 4 floats a token spreads stores over banks.
template <int COUNT, int MATRICES> struct Rows {
    static constexpr int WIDTH = 8, VECTORS = COUNT * PADDED / WIDTH, ITEMS = (VECTORS + THREADS - 1) / THREADS;
    static constexpr int ROW = MATRICES * STATES_A_THREAD, PITCH = MATRICES * PADDED + 4, SIZE = COUNT * PITCH;

    // Brings the rows of the tokens from t0 on into `slots`, VECTORS of them, each thread its own.
    template <class T> static INLINE void fetch(Vector<T, WIDTH>* slots, const T* matrix, i64 stride, int t0, int length,
                                                const signed char* marks) {
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int index = bringer() + item * THREADS, n = index % (PADDED / WIDTH) * WIDTH;
            int t = t0 + index / (PADDED / WIDTH);
            bool there = t < length;
            if (SEGMENTS && there) there = marks[t] != PADDING;
            if (index < VECTORS)
                copy_async<ALIGNED>(slots + index, at_row(matrix + n, t, stride), there ? min(WIDTH, STATES - n) : 0);
        }
    }

    template <class T>
    static INLINE void spread(float (&values)[WIDTH * MATRICES], int matrix, const Vector<T, WIDTH>& vector) {
#pragma unroll
        for (int v = 0; v < WIDTH; v++) values[v / S * ROW + matrix * S + v % S] = vector.get(v);
    }

    template <class... T> static INLINE void stage(float* shared, const Vector<T, WIDTH>*... slots) {
        static_assert(sizeof...(T) == MATRICES);
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int index = bringer() + item * THREADS, n = index % (PADDED / WIDTH) * WIDTH;
            if (index >= VECTORS) continue;
            float values[WIDTH * MATRICES];
            int matrix = 0;
            (spread(values, matrix++, slots[index]), ...);
            auto* to = reinterpret_cast<float4*>(shared + index / (PADDED / WIDTH) * PITCH + n * MATRICES);
#pragma unroll
            for (int i = 0; i < WIDTH * MATRICES; i += 4)
                to[i / 4] = {values[i], values[i + 1], values[i + 2], values[i + 3]};
        }
    }

    // A lane's states at a token: `lane_rows` is shared + lane * ROW.
    static INLINE void read(float (&row)[ROW], const float* lane_rows, int token) {
        constexpr int PART = ROW < 4 ? ROW : 4;
#pragma unroll
        for (int i = 0; i < ROW; i += PART) {
            auto part = *reinterpret_cast<const Vector<float, PART>*>(lane_rows + token * PITCH + i);
#pragma unroll
            for (int v = 0; v < PART; v++) row[i + v] = part.words[v];
        }
    }
};

// A thread's share of bringing tokens x channels: WIDTH neighbouring channels of a token, in ITEMS items.
template <int COUNT, int CHANNELS, int WIDTH> struct Share {
    static constexpr int VECTORS = COUNT * CHANNELS / WIDTH, ITEMS = (VECTORS + THREADS - 1) / THREADS;
    static INLINE int index(int item) { return bringer() + item * THREADS; }
    static INLINE bool mine(int item) { return VECTORS % THREADS == 0 || index(item) < VECTORS; }
    static INLINE int token(int item) { return index(item) / (CHANNELS / WIDTH); }
    static INLINE int channel(int item) { return index(item) % (CHANNELS / WIDTH) * WIDTH; }

    // `from` points at the block's first channel of token 0.
    template <class T> static INLINE void fetch(Vector<T, WIDTH>* slots, const T* from, i64 stride, int t0, int length,
                                                int valid) {
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int t = t0 + token(item), c = channel(item), count = t < length ? min(WIDTH, valid - c) : 0;
            if (mine(item)) copy_async<ALIGNED>(slots + index(item), at_row(from + c, t, stride), count);
        }
    }
};
