// LSH attention: hashing keys, finding those in a bucket, attention to them. Part of all.inl, inside its namespaces.

void hash(const float* key, int64_t width, const float* rotations, int64_t columns, const int64_t* factors,
          int64_t count, int64_t rounds, float* rotated, int32_t* buckets, int64_t stride) {
    for (int64_t column = 0; column < columns; column += LANES) {
        const float* line = rotations + column;
        Vector even = fill(0), odd = fill(0);
        int64_t i = 0;
        for (; i + 2 <= width; i += 2, line += 2 * columns) {
            add_product(even, fill(key[i]), load(line));
            add_product(odd, fill(key[i + 1]), load(line + columns));
        }
        if (i < width) add_product(even, fill(key[i]), load(line));
        store(rotated + column, even + odd);
    }
    for (int64_t round = 0; round < rounds; ++round) {
        int64_t bucket = 0, scale = 1;
        for (int64_t factor = 0; factor < count; ++factor) {
            const int64_t half = factors[factor] / 2;
            int64_t most = 0, least = 0;
            for (int64_t i = 1; i < half; ++i) {
                if (rotated[i] > rotated[most]) most = i;
                if (rotated[i] < rotated[least]) least = i;
            }
            bucket += (rotated[most] >= -rotated[least] ? most : half + least) * scale;
            scale *= 2 * half;
            rotated += half;
        }
        buckets[round * stride] = int32_t(bucket);
    }
}

int64_t find_same_bucket(const int32_t* buckets, int64_t stride, int64_t rounds, int64_t position, int32_t* found) {
    int64_t count = 0;
    for (int64_t start = 0; start < position; start += LANES) {  // rows are padded to whole blocks of positions
        int32_t same[LANES] = {}, any = 0;
        for (int64_t round = 0; round < rounds; ++round) {
            const int32_t* row = buckets + round * stride;
            const int32_t own = row[position];
            for (int64_t i = 0; i < LANES; ++i) same[i] |= row[start + i] == own;
        }
        for (int64_t i = 0; i < LANES; ++i) any |= same[i];
        if (!any) continue;
        const int64_t end = start + LANES < position ? LANES : position - start;
        for (int64_t i = 0; i < end; ++i)
            if (same[i]) found[count++] = int32_t(start + i);
    }
    return count;
}

// Rows are far apart in memory: those of values are prefetched while keys are read.
template <class W>
void attend_to(const float* query, const int32_t* chosen, int64_t count, int64_t width, const HeadCache& cache,
               int64_t value_stride, float* scores, float* out) {
    constexpr int64_t AHEAD = 8;
    const W *keys = (const W*)cache.keys, *values = (const W*)cache.values;
    const int64_t bytes = value_stride * int64_t(sizeof(W)), positions = round_up(count, LANES);
    for (int64_t i = 0; i < AHEAD && i < count; ++i) prefetch(keys + chosen[i] * value_stride, bytes);
    for (int64_t i = 0; i < count; ++i) {
        if (i + AHEAD < count) prefetch(keys + chosen[i + AHEAD] * value_stride, bytes);
        prefetch(values + chosen[i] * value_stride, bytes);
        const W* key = keys + chosen[i] * value_stride;
        Vector total = fill(0);
        for (int64_t c = 0; c < value_stride; c += LANES) add_product(total, load(query + c), load(key + c));
        scores[i] = sum(total) * (sizeof(W) == 1 ? cache.key_scales[chosen[i]] : 1);
    }
    const float inverse = soften(scores, 0, count, positions, 0);
    for (int64_t column = 0; column < value_stride; column += LANES) {
        Vector mixed = fill(0);
        for (int64_t i = 0; i < count; ++i) {
            const float scale = sizeof(W) == 1 ? cache.value_scales[chosen[i]] : 1;
            add_product(mixed, fill(scores[i] * scale), load(values + chosen[i] * value_stride + column));
        }
        float line[LANES];
        store(line, mixed * fill(inverse));
        for (int64_t i = column; i < width && i < column + LANES; ++i) out[i] = line[i - column];
    }
}

void attend_chosen(const float* query, const int32_t* chosen, int64_t count, int64_t type, int64_t width,
                   const HeadCache& cache, int64_t value_stride, float* scores, float* out) {
    if (type == FLOAT32)
        attend_to<float>(query, chosen, count, width, cache, value_stride, scores, out);
    else if (type == BFLOAT16)
        attend_to<uint16_t>(query, chosen, count, width, cache, value_stride, scores, out);
    else
        attend_to<int8_t>(query, chosen, count, width, cache, value_stride, scores, out);
}
