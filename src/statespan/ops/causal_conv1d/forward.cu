// y = silu(conv(x)): a warp has 64 channels of a strip of tokens and walks along it, the window in registers.
//
// X_ROW, numbers from one token to the next of x; WEIGHT and OFFSET, types of taps and bias; HAS_BIAS; SILU; BLOCKS, of a
// multiprocessor. The others: strips.cuh.

#include "strips.cuh"

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS) conv_forward(
    const Number* x, i64 x_batch, const WEIGHT* weight, const OFFSET* bias, const Number* initial, const SEGMENT* segments, Number* y,
    Number* final, i64 whole, i64 strip) {
    int lane = threadIdx.x % 32, length = int(whole), channel = blockIdx.x * CHANNELS + 2 * lane, count = WIDTH - channel;
    int start = (blockIdx.y * WARPS + threadIdx.x / 32) * int(strip), stop = min(start + int(strip), length);
    if (start >= length) return;
    i64 batch = blockIdx.z;
    x += batch * x_batch + channel;
    y += batch * whole * WIDTH + channel;
    initial += batch * HISTORY * WIDTH + channel;
    segments += batch * whole;

    const Filter filter(weight, bias, channel);
    Pair before[SLOTS];
    i64 current = window_before(before, x, initial, segments, start, X_ROW, count);
    float window[SLOTS][2];
#pragma unroll
    for (int i = 0; i < SLOTS; i++) window[i][0] = before[i].get(0), window[i][1] = before[i].get(1);
    Pair xs[AHEAD], next[AHEAD];
    fetch<X_ROW>(xs, x, start, length, count);
    i64 numbers = SEGMENTS ? number_at(segments, start + lane, length) : 0;
    Marks marks{0, 0};

    auto token = [&](const Pair& value, Number* to) {
        float found[2];
#pragma unroll
        for (int c = 0; c < 2; c++) {
            found[c] = filter.combine(window, value.get(c), c);
            if (SILU) found[c] *= sigmoid(found[c]);
        }
        Pair values;
        values.set(found);
        put(to, values, count);
        push(window, value);
    };
    for (int t = start; t < stop; t += AHEAD) {
        int past = t - start;
        if (SEGMENTS && past % 32 == 0) {
            marks = Marks::of(numbers, current);
            numbers = number_at(segments, t + 32 + lane, length);
        }
        u32 padding = marks.padding >> past % 32, restarts = marks.restarts >> past % 32;
        fetch<X_ROW>(next, x, t + AHEAD, length, count);
        Number* to = y + i64(t) * WIDTH;
        if (t + AHEAD <= stop && ((padding | restarts) & ((1u << AHEAD) - 1)) == 0) {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) token(xs[i], to + i * WIDTH);
        } else {
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                if (t + i >= stop) break;
                if (SEGMENTS && restarts >> i & 1) {
#pragma unroll
                    for (int j = 0; j < SLOTS; j++) window[j][0] = window[j][1] = 0.0f;
                }
                if (SEGMENTS && padding >> i & 1) put(to + i * WIDTH, Pair{}, count);
                else token(xs[i], to + i * WIDTH);
            }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) xs[i] = next[i];
    }
    if (stop < length) return;
#pragma unroll
    for (int i = 0; i < HISTORY; i++) {
        Pair values;
        values.set(window[i]);
        put(final + (batch * HISTORY + i) * WIDTH + channel, values, count);
    }
}
