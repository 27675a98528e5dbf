// Rows of chosen units: their products with x, and their sum for the residual stream. Part of all.inl, inside its
// namespaces.

// out[r] = row[r] . x. Sums of long int8 rows are computed in pieces, so that they fit into 32 bits.
template <int R, bool FAR, class W>
inline void whole_rows(const Matrix& w, const int64_t* row, const int64_t* next, const Activations& x, float* out) {
    const int64_t stride = round_up(w.cols, PAD), piece = sizeof(W) == 1 ? LONGEST : stride;
    for (int64_t column = 0; column < stride; column += piece) {
        const W *rows[R], *nexts[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            rows[r] = (const W*)w.data + row[r] * stride + column;
            nexts[r] = (const W*)w.data + next[r] * stride + column;
        }
        float part[1][R];
        const int64_t count = column + piece < stride ? piece : stride - column;
        dot<R, 1, FAR ? ROWS_AHEAD : NOTHING_AHEAD>(rows, Dot<W>::inputs(x, 0) + column, x.stride, count, nexts, part);
        for (int r = 0; r < R; ++r) out[r] = column ? out[r] + part[0][r] : part[0][r];
    }
    for (int r = 0; sizeof(W) == 1 && r < R; ++r) out[r] *= w.scale[row[r]] * x.scales[0];
}

// Activations of chosen units. With FAR their rows come from memory: those of the next units are prefetched, and a
// unit's down row as soon as its activation is not zero.
template <bool FAR, class W>
inline void dots_of_units(const Matrix& units, int64_t parts, int64_t activation, const float* unit_bias,
                          const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, float* h) {
    const int64_t bytes = round_up(units.cols, PAD) * type_bytes(units.type);
    const int64_t inward = parts - 1;             // gate and up, or up alone
    constexpr int64_t AT_ONCE = 4, DISTANCE = 4;  // units that are computed together, and that are prefetched
    const auto finish = [&](int64_t i, float gate, float up) {
        if (unit_bias) gate += unit_bias[chosen[i]];
        h[i] = activation_of(activation, gate) * (inward == 2 ? up : 1);
        if (FAR && h[i] != 0) prefetch((const char*)units.data + (int64_t(chosen[i]) * parts + inward) * bytes, bytes);
    };
    for (int64_t i = begin; i < end;) {
        int64_t row[AT_ONCE], next[AT_ONCE];
        const int64_t together = i + AT_ONCE <= end ? AT_ONCE : 1;
        for (int64_t j = 0; j < together; ++j) {
            row[j] = int64_t(chosen[i + j]) * parts;
            next[j] = i + j + DISTANCE < end ? int64_t(chosen[i + j + DISTANCE]) * parts : row[j];
        }
        float first[AT_ONCE], second[AT_ONCE] = {};
        for (int64_t k = 0; k < inward; ++k) {
            if (together == AT_ONCE)
                whole_rows<AT_ONCE, FAR, W>(units, row, next, x, k ? second : first);
            else
                whole_rows<1, FAR, W>(units, row, next, x, k ? second : first);
            for (int64_t j = 0; j < together; ++j) ++row[j], ++next[j];
        }
        for (int64_t j = 0; j < together; ++j) finish(i + j, first[j], second[j]);
        i += together;
    }
}

template <class W>
void typed_unit_dots(const Matrix& units, int64_t parts, int64_t activation, const float* unit_bias,
                     const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, bool far, float* h) {
    if (far) return dots_of_units<true, W>(units, parts, activation, unit_bias, chosen, begin, end, x, h);
    dots_of_units<false, W>(units, parts, activation, unit_bias, chosen, begin, end, x, h);
}

void unit_dots(const Matrix& units, int64_t parts, int64_t activation, const float* unit_bias, const int32_t* chosen,
               int64_t begin, int64_t end, const Activations& x, bool far, float* h) {
    const auto dots = units.type == FLOAT32    ? typed_unit_dots<float>
                      : units.type == BFLOAT16 ? typed_unit_dots<uint16_t>
                      : units.type == FLOAT16  ? typed_unit_dots<Half>
                                               : typed_unit_dots<int8_t>;
    dots(units, parts, activation, unit_bias, chosen, begin, end, x, far, h);
}

template <bool FAR, class W>
inline void dots_of_rows(const Matrix& w, const int32_t* chosen, int64_t begin, int64_t end, const Activations& x,
                         float* out) {
    constexpr int64_t AT_ONCE = 4;
    for (int64_t i = begin; i < end;) {
        int64_t row[AT_ONCE], next[AT_ONCE];
        const int64_t together = i + AT_ONCE <= end ? AT_ONCE : 1;
        for (int64_t j = 0; j < together; ++j) {
            row[j] = chosen[i + j];
            next[j] = i + j + AT_ONCE < end ? chosen[i + j + AT_ONCE] : row[j];
        }
        if (together == AT_ONCE)
            whole_rows<AT_ONCE, FAR, W>(w, row, next, x, out + i);
        else
            whole_rows<1, FAR, W>(w, row, next, x, out + i);
        i += together;
    }
}

template <class W>
void typed_row_dots(const Matrix& w, const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, bool far,
                    float* out) {
    if (far) return dots_of_rows<true, W>(w, chosen, begin, end, x, out);
    dots_of_rows<false, W>(w, chosen, begin, end, x, out);
}

void row_dots(const Matrix& w, const int32_t* chosen, int64_t begin, int64_t end, const Activations& x, bool far,
              float* out) {
    const auto dots = w.type == FLOAT32    ? typed_row_dots<float>
                      : w.type == BFLOAT16 ? typed_row_dots<uint16_t>
                      : w.type == FLOAT16  ? typed_row_dots<Half>
                                           : typed_row_dots<int8_t>;
    dots(w, chosen, begin, end, x, far, out);
}

constexpr int64_t PREFETCHED = 1 << 18;  // bytes that are prefetched at most

// y += sum of R rows, each times its factor.
template <int R, class W>
inline void add_rows(const W* const* rows, const float* factor, int64_t begin, int64_t end, float* y) {
    int64_t c = begin;
    Vector factors[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) factors[r] = fill(factor[r]);
    for (; c + LANES <= end; c += LANES) {
        Vector total = load(y + c);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) add_product(total, factors[r], load(rows[r] + c));
        store(y + c, total);
    }
    if (c == end) return;
    float lane[LANES] = {};  // the last columns of a width that is no multiple of LANES; rows are padded, y is not
    for (int64_t i = c; i < end; ++i) lane[i - c] = y[i];
    Vector total = load(lane);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) add_product(total, factors[r], load(rows[r] + c));
    store(lane, total);
    for (int64_t i = c; i < end; ++i) y[i] = lane[i - c];
}

template <class W>
void sum_units(const Matrix& units, int64_t parts, const int32_t* chosen, const float* h, int64_t count, int64_t begin,
               int64_t end, float* y) {
    constexpr int64_t AT_ONCE = 4;
    const int64_t stride = round_up(units.cols, PAD), bytes = (end - begin) * int64_t(sizeof(W));
    const W* data = (const W*)units.data + begin;
    const auto row_of = [&](int64_t i) { return data + (int64_t(chosen[i]) * parts + parts - 1) * stride; };
    // Rows are prefetched long before they are used, as many as the cache holds.
    const int64_t distance = PREFETCHED / (bytes + 1);  // a thread may have no columns at all
    int64_t asked = 0;
    const W* rows[AT_ONCE];
    float factor[AT_ONCE];
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        for (; asked < count && asked < i + distance; ++asked)
            if (h[asked] != 0) prefetch(row_of(asked), bytes);
        if (h[i] != 0) {
            rows[found] = row_of(i) - begin;
            factor[found++] = h[i] * (units.scale ? units.scale[int64_t(chosen[i]) * parts + parts - 1] : 1);
        }
        if (found == AT_ONCE) {
            add_rows<AT_ONCE>(rows, factor, begin, end, y);
            found = 0;
        }
    }
    for (int64_t r = 0; r < found; ++r) add_rows<1>(rows + r, factor + r, begin, end, y);
}

void unit_sums(const Matrix& units, int64_t parts, const int32_t* chosen, const float* h, int64_t count, int64_t begin,
               int64_t end, float* y) {
    if (units.type == FLOAT32)
        sum_units<float>(units, parts, chosen, h, count, begin, end, y);
    else if (units.type == BFLOAT16)
        sum_units<uint16_t>(units, parts, chosen, h, count, begin, end, y);
    else if (units.type == FLOAT16)
        sum_units<Half>(units, parts, chosen, h, count, begin, end, y);
    else
        sum_units<int8_t>(units, parts, chosen, h, count, begin, end, y);
}
