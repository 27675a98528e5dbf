#include "layers/embedding.h"

namespace sparsecli {

namespace {

void read_row(const Pass& pass, const Matrix& table, int64_t row, float* out) {
    if (of_gguf(table.type)) return pass.ops.read_gguf(table, row, out);
    const int64_t stride = round_up(table.cols, PAD) * type_bytes(table.type);
    pass.ops.widen((const char*)table.data + row * stride, table.scale ? table.scale + row : nullptr, table.type,
                   table.cols, out);
}

// Cosines, then sines, times `factor`.
void write_angles(const Matrix& frequencies, int64_t position, float factor, float* angles) {
    const int64_t half = frequencies.cols;
    for (int64_t i = 0; i < half; ++i) {
        angles[i] = std::cos(float(position) * values(frequencies)[i]) * factor;
        angles[half + i] = std::sin(float(position) * values(frequencies)[i]) * factor;
    }
}

}  // namespace

Embedding::Embedding(Workspace& space) {
    space.for_tokens(position_, space.shape.positions == LEARNED ? space.shape.d_model : 0, true);
}

void Embedding::run(Pass& pass) {
    const Range tokens = pass.mine(pass.count(), 1);
    for (int64_t t = tokens.begin; t < tokens.end; ++t) embed(pass, t);
    pass.barrier(OTHER);
}

// Learned and sinusoidal positions of tokens begin after a prefix; rotary ones count it.
void Embedding::embed(Pass& pass, int64_t t) {
    const sparsecli_shape& s = pass.shape;
    const Model& model = pass.model;
    const Token& token = pass.token(t);
    const bool encoded = token.encoder_states[0];
    float* x = pass.space.residual.row(t);
    const int64_t d = s.d_model, position = token.position - token.sequence->prefix;
    const size_t bytes = size_t(d) * sizeof(float);
    if (encoded) {
        std::memcpy(x, token.encoder_states[0], bytes);
    } else {
        read_row(pass, model.embedding, token.id, x);
        for (int64_t i = 0; i < d; ++i) x[i] *= float(s.embedding_scale);
    }
    if (s.positions == LEARNED && !encoded) {
        read_row(pass, model.positions, position, position_.row(t));
        for (int64_t i = 0; i < d; ++i) x[i] += position_.row(t)[i];
    }
    if (s.positions == ROTARY) {
        const Matrix& frequencies = token.sequence->long_frequencies ? model.long_frequencies : model.frequencies;
        write_angles(frequencies, token.position, float(s.rotary_attention_factor), pass.space.rotary.row(t));
    }
    if (model.has_sliding_rotary())
        write_angles(model.sliding_frequencies, token.position, 1, pass.space.sliding_rotary.row(t));
    const float* frequency = values(model.frequencies);
    const int64_t half = model.frequencies.cols;
    for (int64_t i = 0; i < half && s.positions == SINUSOIDAL && !encoded; ++i) {
        x[i] += std::sin(float(position) * frequency[i]);  // all sines, then all cosines
        x[half + i] += std::cos(float(position) * frequency[i]);
    }
    if (s.streams == 2) std::memcpy(pass.space.second_stream.row(t), encoded ? token.encoder_states[1] : x, bytes);
}

}  // namespace sparsecli
