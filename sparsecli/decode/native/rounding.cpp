// The inner loops of second-order rounding: scales of groups of weights, and columns that are rounded one after another.
// The twins are in sparsecli/decode/native/rounding.py.
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine.h"
#include "parallel.h"

namespace {

constexpr int64_t ROWS = 256;         // of a column that are rounded together: a block of them stays in the cache
constexpr float SHIFT = 12582912.0f;  // added and taken away, it rounds a small float to the nearest whole one

// A table of whole values in ascending order, and the code of the nearest one: midpoints are whole multiples of a half.
struct Table {
    const float* values = nullptr;  // null: codes are their own values
    int64_t count = 0;
    std::vector<float> nearest;  // of every half from the first value to the last

    Table(const float* values, int64_t count) : values(values), count(count) {
        if (!values) return;
        for (int64_t half = 0, code = 0; half <= 2 * int64_t(values[count - 1] - values[0]); ++half) {
            const float middle = values[0] + 0.5f * float(half) + 0.25f;
            while (code + 1 < count && middle > 0.5f * (values[code] + values[code + 1])) ++code;
            nearest.push_back(float(code));
        }
    }

    float code(float wanted) const {
        const float inside = std::min(values[count - 1], std::max(values[0], wanted));  // so, NaN is the first, too
        return nearest[size_t(2 * (inside - values[0]))];
    }
};

struct Columns {
    float *remaining, *codes, *errors;  // (columns, rows)
    const float *scales, *offsets;      // (groups, rows)
    const int64_t* groups;              // (columns,)
    const float* factor;                // (columns, columns), with a stride
    int64_t columns, rows, stride;
    float lowest, highest;
    const Table& table;
};

void round_rows(const Columns& all, int64_t first, int64_t end) {
    const int64_t count = end - first;
    for (int64_t column = 0; column < all.columns; ++column) {
        const float* factor = all.factor + column * all.stride;
        const float* scale = all.scales + all.groups[column] * all.rows + first;
        const float* offset = all.offsets + all.groups[column] * all.rows + first;
        const float* target = all.remaining + column * all.rows + first;
        float* code = all.codes + column * all.rows + first;
        float* error = all.errors + column * all.rows + first;
        const float inverse = 1.0f / factor[column];
        for (int64_t row = 0; row < count; ++row) {
            const float step = scale[row] == 0 ? 0.0f : 1.0f / scale[row];
            float wanted = (target[row] - offset[row]) * step;
            wanted = std::min(std::max(wanted, all.lowest), all.highest);
            code[row] = (wanted + SHIFT) - SHIFT;
            error[row] = (target[row] - (scale[row] * code[row] + offset[row])) * inverse;
        }
        for (int64_t row = 0; row < count && all.table.values; ++row) {
            code[row] = all.table.code(scale[row] == 0 ? 0.0f : target[row] / scale[row]);
            error[row] = (target[row] - scale[row] * all.table.values[int64_t(code[row])]) * inverse;
        }
        for (int64_t later = column + 1; later < all.columns; ++later) {
            float* rest = all.remaining + later * all.rows + first;
            const float share = factor[later];
            for (int64_t row = 0; row < count; ++row) rest[row] -= share * error[row];
        }
    }
}

// The sums over a group for which a guess of the scale gives the values q of codes: w q, w q q and w x q.
struct Sums {
    float first = 0, second = 0, product = 0;
};

Sums sums_of(const float* x, const float* weight, int64_t group, float low, float inverse, float lowest, float highest,
             const Table& table) {
    Sums sums;
    for (int64_t i = 0; i < group; ++i) {
        float value = std::min(std::max((x[i] - low) * inverse, lowest), highest);
        value = table.values ? table.values[int64_t(table.code(value))] : (value + SHIFT) - SHIFT;
        const float weighted = weight[i] * value;
        sums.first += weighted;
        sums.second += weighted * value;
        sums.product += weighted * x[i];
    }
    return sums;
}

// Values around zero: the weight of the largest magnitude gets the lowest or the highest one.
float fit_scale(const float* x, const float* weight, int64_t group, float lowest, float highest, const Table& table,
                const float* shares, int64_t count) {
    float extreme = 0;
    for (int64_t i = 0; i < group; ++i)
        if (std::abs(x[i]) > std::abs(extreme)) extreme = x[i];
    if (extreme == 0) return 0;
    float best = 0, gain = -1;
    for (const float end : {lowest, highest})
        for (int64_t guess = 0; guess < count; ++guess) {
            const float step = extreme * (shares[guess] / end);
            const Sums sums = sums_of(x, weight, group, 0, 1 / step, lowest, highest, table);
            const float second = std::max(sums.second, 1e-30f), explained = sums.product * sums.product / second;
            if (explained > gain) gain = explained, best = sums.product / second;
        }
    return best;
}

// Codes from zero, and a minimum that is not above zero.
void fit_range(const float* x, const float* weight, int64_t group, float highest, const float* shares, int64_t count,
               float& scale, float& minimum) {
    const Table table(nullptr, 0);
    float low = 0, high = 0, total = 0, mean = 0, gain = -INFINITY;
    for (int64_t i = 0; i < group; ++i) {
        low = std::min(low, x[i]), high = std::max(high, x[i]);
        total += weight[i], mean += weight[i] * x[i];
    }
    scale = minimum = 0;
    const float span = std::max(high - low, 1e-30f);
    for (int64_t guess = 0; guess < count; ++guess) {
        const float share = shares[guess];
        const Sums sums = sums_of(x, weight, group, low * share, highest / (share * span), 0, highest, table);
        const float determinant = total * sums.second - sums.first * sums.first;
        float step = 0, start = mean / total;
        if (determinant > 0) {
            step = (total * sums.product - sums.first * mean) / determinant;
            start = (sums.second * mean - sums.first * sums.product) / determinant;
        }
        if (start > 0) start = 0, step = sums.product / std::max(sums.second, 1e-30f);
        step = std::max(step, 0.0f);
        // The squared error, but for a constant.
        const float error = step * (step * sums.second + 2 * start * sums.first - 2 * sums.product) +
                            start * (start * total - 2 * mean);
        if (-error > gain) gain = -error, scale = step, minimum = start;
    }
}

}  // namespace

int64_t sparsecli_fit_groups(const float* weights, const float* importance, int64_t rows, int64_t cols, int64_t group,
                             float lowest, float highest, const float* values, int64_t codes, const float* shares,
                             int64_t count, float* scale, float* minimum, int64_t threads) {
    const int64_t groups = cols / group;
    const Table table(values, codes);
    sparsecli::in_parallel(threads, [&](int64_t number) {
        for (int64_t row = number; row < rows; row += threads)
            for (int64_t at = 0; at < groups; ++at) {
                const float *x = weights + row * cols + at * group, *weight = importance + at * group;
                const int64_t place = row * groups + at;
                if (minimum)
                    fit_range(x, weight, group, highest, shares, count, scale[place], minimum[place]);
                else
                    scale[place] = fit_scale(x, weight, group, lowest, highest, table, shares, count);
            }
    });
    return 0;
}

int64_t sparsecli_round_columns(float* remaining, float* codes, float* errors, const float* scales,
                                const float* offsets, const int64_t* groups, const float* factor, int64_t columns,
                                int64_t rows, int64_t stride, float lowest, float highest, const float* values,
                                int64_t count, int64_t threads) {
    const Table table(values, count);
    const Columns all{remaining, codes, errors, scales, offsets, groups, factor,
                      columns,   rows,  stride, lowest, highest, table};
    sparsecli::in_parallel(threads, [&](int64_t number) {
        for (int64_t first = number * ROWS; first < rows; first += threads * ROWS)
            round_rows(all, first, std::min(first + ROWS, rows));
    });
    return 0;
}
