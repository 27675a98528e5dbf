// Outer products: the multiplicative layer and the convolution. Part of all.inl, inside its namespaces.

// c[r][columns] += a[r] . panel, R rows by V vectors of columns; a row of `a` holds `inputs` values.
template <int R, int V>
inline void tile(const float* a, int64_t a_stride, const float* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    constexpr int N = V * PARTS;
    Floats sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = floats_of(c + r * c_stride + n * WIDTH);
    for (int64_t i = 0; i < inputs; ++i) {
        Floats b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = floats_of(panel + i * width + n * WIDTH);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Floats scalar = broadcast(a[r * a_stride + i]);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = fused(sums[r][n], scalar, b[n]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) *(FloatsAt*)(c + r * c_stride + n * WIDTH) = sums[r][n];
}

// The same with a panel of pairs of bfloat16; `a` holds bfloat16, too, or the same numbers as floats.
template <int R, int V, class A>
inline void tile(const A* a, int64_t a_stride, const uint16_t* panel, int64_t width, int64_t inputs, float* c,
                 int64_t c_stride) {
    constexpr int N = V * PARTS;
    Floats sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = floats_of(c + r * c_stride + n * WIDTH);
    for (int64_t i = 0; i < inputs; i += 2) {
        Ints b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = *(const IntsAt*)(panel + i * width + n * 2 * WIDTH);
#if defined(SPARSECLI_BF16)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Ints pair = pair_everywhere(a + r * a_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_pairs(sums[r][n], pair, b[n]);
        }
#else
        Floats first[N], second[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) first[n] = first_of(b[n]), second[n] = second_of(b[n]);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const A* pair = a + r * a_stride + i;
            Floats x, y;
            if constexpr (sizeof(A) == 4) {
                x = broadcast(pair[0]), y = broadcast(pair[1]);
            } else {
                const Ints both = pair_everywhere(pair);
                x = first_of(both), y = second_of(both);
            }
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = fused(fused(sums[r][n], x, first[n]), y, second[n]);
        }
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) *(FloatsAt*)(c + r * c_stride + n * WIDTH) = sums[r][n];
}

// Eight-bit products of one group of inputs; `a` is quantised with a_scale[r] and has row sums total[r]. Panels
// hold weights + 128, since processors multiply unsigned with signed bytes. x86 without such an instruction multiplies
// 16-bit integers: `a` holds each four in the order 0 2 1 3, to be multiplied with the even and the odd bytes of
// weights.
#if defined(SPARSECLI_QUADS)
using Narrow = int8_t;
#else
using Narrow = int16_t;
#endif
template <int R, int V>
inline void tile(const Narrow* a, int64_t a_stride, const float* a_scale, const int32_t* total, const uint8_t* panel,
                 int64_t width, int64_t inputs, const float* scale, float* c, int64_t c_stride) {
    constexpr int N = V * PARTS;
    Ints sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sums[r][n] = Ints{} - PANEL_ZERO * total[r];
    for (int64_t i = 0; i < inputs; i += 4) {
        Ints b[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) b[n] = panel_bytes(panel + i * width + n * 4 * WIDTH);
#if defined(SPARSECLI_QUADS)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Ints quad = pair_everywhere(a + r * a_stride + i);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_quads(sums[r][n], b[n], quad);
        }
#else
        typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
        Shorts even[N], odd[N];
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            even[n] = (Shorts)(b[n] & 0x00ff00ff);
            odd[n] = (Shorts)((Words)b[n] >> 8 & 0x00ff00ff);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Narrow* quad = a + r * a_stride + i;
            const Shorts x = (Shorts)pair_everywhere(quad), y = (Shorts)pair_everywhere(quad + 2);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) sums[r][n] = add_pairs(add_pairs(sums[r][n], even[n], x), odd[n], y);
        }
#endif
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            FloatsAt* to = (FloatsAt*)(c + r * c_stride + n * WIDTH);
            const Floats both = floats_of(scale + n * WIDTH) * a_scale[r];
            *to = fused(*to, __builtin_convertvector(sums[r][n], Floats), both);
        }
}

// The vectors of columns and the rows of a tile whose sums stay in registers, for weights W.
template <class W>
constexpr int tile_vectors() {
#if defined(SPARSECLI_NEON)
    return 1;
#elif defined(SPARSECLI_BF16)
    return 4;
#elif defined(SPARSECLI_AVX512)
    return sizeof(W) == 4 ? 4 : 2;
#else
    return sizeof(W) == 4 ? 2 : 1;
#endif
}

template <class W>
constexpr int tile_rows(int vectors) {
#if defined(SPARSECLI_NEON)
    return 4;
#elif defined(SPARSECLI_BF16)
    return vectors == 4 ? 4 : vectors == 2 ? 12 : 16;
#elif defined(SPARSECLI_AVX512)
    return vectors == 4 ? 6 : 8;
#elif defined(SPARSECLI_AVX2)
    return vectors == 2 ? 3 : 4;
#else
    return 2;
#endif
}

// Cuts rows and columns into tiles and calls call<R, V>(row, column) for each.
template <int R, int V, class F>
inline void tile_column(int64_t rows, int64_t row, int64_t column, const F& call) {
    for (; row + R <= rows; row += R) call.template operator()<R, V>(row, column);
    if constexpr (R > 1)
        if (row < rows) tile_column<R / 2, V>(rows, row, column, call);
}

template <class W, int V, class F>
inline void tile_columns(int64_t rows, int64_t vectors, int64_t vector, const F& call) {
    for (; vector + V <= vectors; vector += V) tile_column<tile_rows<W>(V), V>(rows, 0, vector * LANES, call);
    if constexpr (V > 1)
        if (vector < vectors) tile_columns<W, V / 2>(rows, vectors, vector, call);
}

template <class W, class F>
inline void tiles(int64_t rows, int64_t columns, const F& call) {
    tile_columns<W, tile_vectors<W>()>(rows, columns / LANES, 0, call);
}

// About how many cache lines arrive from memory while so many products of vectors are computed.
inline int64_t lines_of(int64_t products) { return products / 24; }

constexpr int64_t PANEL_BYTES = 24 * 1024;  // of a panel at a time: they stay in the first-level cache for all rows

// c[rows][columns] += a . panel, for float32 and bfloat16 weights.
template <class W, class A>
inline void add_tiles(const A* a, int64_t a_stride, const W* panel, int64_t rows, int64_t columns, int64_t inputs,
                      float* c, int64_t c_stride, ReadAhead* ahead) {
    constexpr int64_t PACK = sizeof(W) == 4 ? 1 : 2;
    const int64_t step = PANEL_BYTES / (columns * int64_t(sizeof(W))) / PACK * PACK;
    for (int64_t first = 0; first < inputs; first += step) {
        const int64_t count = first + step < inputs ? step : inputs - first;
        tiles<W>(rows, columns, [&]<int R, int V>(int64_t row, int64_t column) {
            if (ahead) ahead->some(lines_of(R * V * count));
            tile<R, V>(a + row * a_stride + first, a_stride, panel + first * columns + column * PACK, columns, count,
                       c + row * c_stride + column, c_stride);
        });
    }
}

// -- the multiplicative layer --------------------------------------------------------------------------------

constexpr int64_t SCRATCH = 96 * 1024;  // bytes of products at a time: they stay in the second-level cache
constexpr int64_t MODULE_TILE = 64;     // modules at a time

// x[i] D[s, i] for `count` inputs; returns the largest magnitude.
template <class W>
inline float products(const W* D, const float* x, int64_t count, float* out) {
    Vector top = fill(0);
    for (int64_t i = 0; i < count; i += LANES) {
        const Vector product = load(x + i) * load(D + i);
        store(out + i, product);
        top = larger(top, magnitude(product));
    }
    return sizeof(W) == 1 ? maximum(top) : 0;
}

// Each four integers in the order 0 2 1 3.
inline Ints middle_swapped(Ints v) {
#if defined(SPARSECLI_AVX512)
    return (Ints)_mm512_shuffle_epi32((__m512i)v, _MM_PERM_DBCA);
#elif defined(SPARSECLI_AVX2)
    return (Ints)_mm256_shuffle_epi32((__m256i)v, 0xd8);
#else
    return Ints{v[0], v[2], v[1], v[3]};
#endif
}

// values * inverse as bytes; returns their sum.
inline int32_t narrow(const float* values, int64_t count, float inverse, Narrow* out) {
    typedef Narrow Vector __attribute__((vector_size(WIDTH * sizeof(Narrow))));
    typedef Narrow VectorAt __attribute__((vector_size(WIDTH * sizeof(Narrow)), aligned(1), may_alias));
    Ints total = Ints{};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Ints whole = rounded(floats_of(values + i), broadcast(inverse));
        *(VectorAt*)(out + i) = __builtin_convertvector(sizeof(Narrow) == 1 ? whole : middle_swapped(whole), Vector);
        total += whole;
    }
    int32_t all = 0;
    for (int i = 0; i < WIDTH; ++i) all += total[i];
    return all;
}

// The type of products x D, by the type of weights: float32; bfloat16, rounded; for int8 integers with a scale and a
// sum for each module and GROUP of inputs.
template <class W>
struct Kept {
    using Type = W;
};
#if !defined(SPARSECLI_BF16)
template <>
struct Kept<uint16_t> {
    using Type = float;
};
#endif
template <>
struct Kept<int8_t> {
    using Type = Narrow;
};

// Stores values rounded to bfloat16, as bfloat16 or as float.
inline void keep_rounded(const Vector& values, uint16_t* out) { store(out, values); }
inline void keep_rounded(const Vector& values, float* out) {
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p)
        *(FloatsAt*)(out + p * WIDTH) = (Floats)(bfloat16_bits(values.part[p]) & int32_t(0xffff0000));
}

template <class W>
void typed_multiplicative(const Matrix& D, const Matrix& E, const float* bias, const float* x, int64_t module_begin,
                          int64_t module_end, int64_t panel_begin, int64_t panel_end, float* out, char* scratch,
                          ReadAhead* ahead) {
    using Product = typename Kept<W>::Type;
    const int64_t inputs = round_up(E.cols, PAD), width = E.rows, padded = round_up(width, LANES);
    const int64_t column_begin = panel_begin * PANEL;
    const int64_t column_end = panel_end * PANEL < padded ? panel_end * PANEL : padded;
    if (column_begin >= column_end) return;
    // Chunks of inputs are summed up one after the other. Their size depends on the layer alone, not on the thread's
    // share.
    const int64_t most = D.rows < MODULE_TILE ? D.rows : MODULE_TILE;
    int64_t chunk = SCRATCH / (most * int64_t(sizeof(Product))) / GROUP * GROUP;
    chunk = chunk < GROUP ? GROUP : chunk > inputs ? inputs : chunk;
    const int64_t groups = round_up(chunk, GROUP) / GROUP;
    for (int64_t first = module_begin; first < module_end; first += MODULE_TILE) {
        const int64_t modules = first + MODULE_TILE < module_end ? MODULE_TILE : module_end - first;
        // scratch: products (modules, chunk); then their scales and totals [group][module]; then sums
        Product* kept = (Product*)scratch;
        float* scales = (float*)(scratch + round_up(modules * chunk * int64_t(sizeof(Product)), 64));
        int32_t* totals = (int32_t*)(scales + groups * modules);
        float* sums = (float*)(totals + groups * modules);  // (modules, PANEL)
        for (int64_t start = 0; start < inputs; start += chunk) {
            const int64_t count = start + chunk < inputs ? chunk : inputs - start;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t g = 0; g * GROUP < count; ++g) {
                    const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                    const int64_t begin = start + g * GROUP;
                    float line[GROUP];
                    const float largest =
                        products((const W*)D.data + (first + s) * round_up(D.cols, PAD) + begin, x + begin, size, line);
                    Product* to = kept + s * chunk + g * GROUP;
                    if constexpr (sizeof(W) == 4) {
                        std::memcpy(to, line, size_t(size) * sizeof(float));
                    } else if constexpr (sizeof(W) == 2) {
                        for (int64_t i = 0; i < size; i += LANES) keep_rounded(load(line + i), to + i);
                    } else {
                        totals[g * modules + s] = narrow(line, size, largest > NOTHING ? 127 / largest : 0, to);
                        scales[g * modules + s] = largest / 127;
                    }
                }
            for (int64_t column = column_begin; column < column_end; column += PANEL) {
                const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
                const int64_t real = column + columns < width ? columns : width - column;
                std::memset(sums, 0, size_t(modules * PANEL * 4));
                const W* panel = (const W*)E.data + column * inputs + start * columns;
                if constexpr (sizeof(W) > 1)
                    add_tiles(kept, chunk, panel, modules, columns, count, sums, PANEL, ahead);
                else
                    for (int64_t g = 0; g * GROUP < count; ++g) {
                        const int64_t size = count - g * GROUP < GROUP ? count - g * GROUP : GROUP;
                        tiles<W>(modules, columns, [&]<int R, int V>(int64_t row, int64_t at) {
                            if (ahead) ahead->some(lines_of(R * V * size));
                            tile<R, V>(kept + row * chunk + g * GROUP, chunk, scales + g * modules + row,
                                       totals + g * modules + row, (const uint8_t*)panel + g * GROUP * columns + at * 4,
                                       columns, size, E.scale + column + at, sums + row * PANEL + at, PANEL);
                        });
                    }
                for (int64_t s = 0; s < modules; ++s) {
                    const float scale = sizeof(W) == 1 ? D.scale[first + s] : 1;
                    const int64_t at = (first + s) * width + column;
                    for (int64_t m = 0; m < real; ++m) {
                        const float before = start ? out[at + m] : bias ? bias[at + m] : 0;
                        out[at + m] = before + sums[s * PANEL + m] * scale;
                    }
                }
            }
        }
    }
}

void multiplicative(const Matrix& D, const Matrix& E, const float* bias, const float* x, int64_t module_begin,
                    int64_t module_end, int64_t panel_begin, int64_t panel_end, float* out, void* scratch,
                    ReadAhead* ahead) {
    const auto typed = E.type == FLOAT32    ? typed_multiplicative<float>
                       : E.type == BFLOAT16 ? typed_multiplicative<uint16_t>
                                            : typed_multiplicative<int8_t>;
    typed(D, E, bias, x, module_begin, module_end, panel_begin, panel_end, out, (char*)scratch, ahead);
}

// Windows of bfloat16 with a kernel's panel. Without instructions for bfloat16 the inputs, which windows share, are
// converted to floats first, unless they are too many.
inline void add_windows(const uint16_t* windows, int64_t stride, const uint16_t* panel, int64_t modules,
                        int64_t columns, int64_t inputs, float* sums, ReadAhead* ahead) {
#if !defined(SPARSECLI_BF16)
    constexpr int64_t MOST = 4096;
    const int64_t count = (modules - 1) * stride + inputs;
    if (count <= MOST) {
        float floats[MOST];
        int64_t i = 0;
        for (; i + WIDTH <= count; i += WIDTH) *(FloatsAt*)(floats + i) = floats_of(windows + i);
        for (; i < count; ++i) floats[i] = to_float(windows[i]);
        return add_tiles(floats, stride, panel, modules, columns, inputs, sums, PANEL, ahead);
    }
#endif
    add_tiles(windows, stride, panel, modules, columns, inputs, sums, PANEL, ahead);
}

void convolve(const Matrix& kernel, const float* bias, int64_t taps, const void* const* rows, int64_t stride,
              int64_t lead, int64_t begin, int64_t end, float* out, ReadAhead* ahead) {
    // `kernel` has taps * inputs columns; each tap is a `panels` matrix of its own.
    const int64_t width = kernel.rows, padded = round_up(width, LANES);
    const int64_t inputs = round_up(kernel.cols / taps, 4);
    constexpr int64_t AT_ONCE = 16;
    float sums[AT_ONCE * PANEL];
    for (int64_t first = begin; first < end; first += AT_ONCE) {
        const int64_t modules = first + AT_ONCE < end ? AT_ONCE : end - first;
        for (int64_t column = 0; column < padded; column += PANEL) {
            const int64_t columns = column + PANEL < padded ? PANEL : padded - column;
            const int64_t real = column + columns < width ? columns : width - column;
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < columns; ++c) sums[s * PANEL + c] = bias && c < real ? bias[column + c] : 0;
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t panel = tap * inputs * padded + column * inputs;
                const int64_t window = first * stride - lead;
                if (kernel.type == FLOAT32)
                    add_tiles((const float*)rows[tap] + window, stride, (const float*)kernel.data + panel, modules,
                              columns, inputs, sums, PANEL, ahead);
                else
                    add_windows((const uint16_t*)rows[tap] + window, stride, (const uint16_t*)kernel.data + panel,
                                modules, columns, inputs, sums, ahead);
            }
            for (int64_t s = 0; s < modules; ++s)
                for (int64_t c = 0; c < real; ++c) out[(first + s) * width + column + c] = sums[s * PANEL + c];
        }
    }
}
