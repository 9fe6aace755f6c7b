// The whole C ABI of the native kernels: plain pointers, 64-bit sizes, an int status. No torch, no exceptions.
#pragma once
#include <stdint.h>

#define DBRXQ_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Version of this interface; the Python side refuses a library that reports another one.
#define DBRXQ_ABI_VERSION 8
DBRXQ_API int dbrxq_abi_version(void);

// Threads that the kernels may use, all callers together; by default all hardware threads.
DBRXQ_API void dbrxq_set_threads(int count);
DBRXQ_API int dbrxq_threads(void);

// From now on a process that reads beyond the end of a file that was cut while it was mapped says which file, and exits
// with status 1, instead of dying by SIGBUS; a handler that is there already is called instead of exiting.
DBRXQ_API void dbrxq_explain_bus_errors(void);

// ---------------------------------------------------------------------------------------------------------------
// Linears and experts (pack_codes.cpp, linear.cpp, experts.cpp; oracles: tests/helpers/oracles_ops.py).
// Axes: T tokens, K input channels, N output channels as stored, G groups, R word rows, E experts, D hidden, F ffn,
// A experts per token. Matrices are dense and row-major. Pointers into files need no alignment; float, int64 and
// output pointers have that of their type. Nothing is kept after a call returns.

enum {
  DBRXQ_OK = 0,
  DBRXQ_BAD_SHAPE = 1,        // a size is negative, not the multiple it must be, or two sizes disagree
  DBRXQ_BAD_GROUPS = 2,       // the group table is not a legal map of K rows in R words
  DBRXQ_BAD_PERMUTATION = 3,  // q_invperm does not name every row once
  DBRXQ_BAD_EXPERT = 4,       // an index in top_k_index is below 0 or above E
  DBRXQ_BAD_ACTIVATION = 5,   // no such activation
  DBRXQ_BAD_ISA = 6,          // no such instruction set, or this CPU lacks it
  DBRXQ_NO_MEMORY = 7,
  DBRXQ_NOT_FINITE = 8,    // dbrxq_repack: some scale is not finite, or large enough for infinite weights
  DBRXQ_BAD_REPACKED = 9,  // a head that this library did not make
  DBRXQ_DAMAGED = 10,      // the body of a repacked linear is not what its checksum says
};
DBRXQ_API const char* dbrxq_status_text(int status);

// Instruction set that the kernels use: "scalar", "avx2", "avxvnni" (avx2 with byte dot products) or "avx512" (F, BW,
// VL, DQ and VNNI). The best that the CPU has, unless the
// environment variable DBRXQ_ISA names another (an unusable one there fails every kernel call with DBRXQ_BAD_ISA).
// dbrxq_set_isa switches the whole process; not while another thread computes.
DBRXQ_API const char* dbrxq_isa(void);
DBRXQ_API int dbrxq_set_isa(const char* name);

// One quantized linear as the file holds it (common/layout.h has the pictures).
typedef struct dbrxq_linear {
  const void* q_weight;     // uint32 [R, N]
  const void* q_scale;      // uint32 [G, N/8]
  const void* q_scale_max;  // half   [G]
  const void* q_groups;     // int16  [G, 2]  (bits, first word row)
  const void* q_invperm;    // int32  [K]     packed row of each input channel
  const void* bias;         // half   [N], or null
  int64_t k;
  int64_t n;             // a multiple of 32
  int64_t word_rows;     // R
  int64_t groups;        // G
  int64_t out_features;  // 1..n: columns that are wanted; the rest is padding
} dbrxq_linear;

// words [R, N] from codes [K, N], one a byte in packed row order (bits above the width are ignored); and back.
DBRXQ_API int dbrxq_pack_codes(const uint8_t* codes, const int16_t* q_groups, int64_t groups, int64_t k, int64_t n,
                               int64_t word_rows, uint32_t* words);
DBRXQ_API int dbrxq_unpack_codes(const void* words, const int16_t* q_groups, int64_t groups, int64_t k, int64_t n,
                                 int64_t word_rows, uint8_t* codes);

// weight [K, out_features] half, input channels in their original order: the exact weights of the format, bit for
// bit. (K, N) and not (N, K): a row of packed words decodes into a row of weights, so every store is contiguous.
DBRXQ_API int dbrxq_dequantize(const dbrxq_linear* linear, uint16_t* weight);

// y [T, out_features] = x [T, K] . weight + bias, with the exact half weights and fp32 sums. The order of the sums
// depends on T alone: any number of threads gives the same bits, and so do AVX2 and AVX-512.
DBRXQ_API int dbrxq_linear_forward(const dbrxq_linear* linear, const float* x, int64_t tokens, float* y);

enum {
  DBRXQ_SILU = 0,
  DBRXQ_GELU = 1,       // x Phi(x), by erf
  DBRXQ_GELU_TANH = 2,  // its tanh form
  DBRXQ_RELU = 3,
};

// y [T, D] = sum over a of top_k_weights[t, a] * down_e(activation(gate_e(x_t)) * up_e(x_t)), e = top_k_index[t, a].
// gate, up and down are arrays of E linears: D -> F, D -> F and F -> D. The index E means "no expert" and adds
// nothing. Only experts with tokens are touched; the sum runs in order of a, whatever the number of threads.
DBRXQ_API int dbrxq_experts_forward(const float* x, const int64_t* top_k_index, const float* top_k_weights,
                                    int64_t tokens, int64_t hidden, int64_t active, int64_t experts,
                                    const dbrxq_linear* gate, const dbrxq_linear* up, const dbrxq_linear* down,
                                    int activation, float* y);

// ---------------------------------------------------------------------------------------------------------------
// Repacked linears and experts (repack.cpp, integer.cpp, integer_experts.cpp): the same linears in a layout made for
// speed (cpu/repacked/repacked.h), multiplied by activations rounded to integers. A repacked linear is a head, which stands for
// it in all calls, and a body, to which the head has a pointer; both are aligned to 64 bytes.
// activation_bits is 16, or 8: then activations are single bytes where they meet codes of up to 4 bits, and two bytes
// elsewhere. Sums within 128 rows are exact, results depend neither on the threads nor (but for the last bit of a
// float product) on the instruction set. Weights are code times exact scale, without the format's rounding to half.

// Version of the layout of bodies, which files keep. It is the same for all instruction sets.
#define DBRXQ_LAYOUT_VERSION 1

// Bytes of head and body of a linear; and both. DBRXQ_NOT_FINITE leaves a head that is none.
DBRXQ_API int dbrxq_repacked_bytes(const dbrxq_linear* linear, int64_t* head, int64_t* body);
DBRXQ_API int dbrxq_repack(const dbrxq_linear* linear, void* head, void* body);

// The head of a linear whose body was made earlier and kept in a file; q_weight and q_scale are not read. The first call
// that needs the body compares it with the checksum, and every call gives DBRXQ_DAMAGED where it differs. What the body
// holds never decides what is read. `mapped`: its pages come from a file, and are asked for ahead of their use.
DBRXQ_API int dbrxq_repacked_head(const dbrxq_linear* linear, const void* body, uint64_t checksum, int mapped,
                                  void* head);

// The checksum of a repacked linear: of all that its results depend on.
DBRXQ_API int dbrxq_repacked_checksum(const void* packed, uint64_t* checksum);

// DBRXQ_OK or DBRXQ_DAMAGED: as the first use of the body.
DBRXQ_API int dbrxq_repacked_check(const void* packed);

// y [T, sum of out_features] = x [T, K] times `count` linears of the same K, side by side.
DBRXQ_API int dbrxq_repacked_linear(const void* const* packed, int64_t count, int activation_bits, const float* x,
                                    int64_t tokens, float* y);

// Reads `bytes` bytes (whole pairs of cache lines) with all threads, for benchmarks; the sum of their 64-bit words.
DBRXQ_API int dbrxq_read_memory(const void* data, int64_t bytes, uint64_t* sum);

// As dbrxq_experts_forward. packed: gate of the E experts, then up of all, then down of all.
DBRXQ_API int dbrxq_repacked_experts(const void* const* packed, int64_t experts, int activation_bits, const float* x,
                                     const int64_t* top_k_index, const float* top_k_weights, int64_t tokens,
                                     int64_t hidden, int64_t active, int activation, float* y);

// ---------------------------------------------------------------------------------------------------------------
// Decoder (decoder.cpp; oracle: the layers of transformers): all layers of a model for a few new tokens of each of B
// sequences of equal length, in one call, between the embedding and the head. Activations and sums are fp32 throughout.
// Axes: B sequences, T new tokens of each, D hidden, H query heads, J key heads, E experts.

// One layer:  x += output(attention(qkv(norm(x)))),  x += mlp(norm(x)). Weights that are not repacked linears are of
// the decoder's dtype.
typedef struct dbrxq_decoder_layer {
  const void* attention_norm;  // [D]
  const void* mlp_norm;        // [D]
  const void* query_norm;      // [head_dim], of each head, before the rotation; or null
  const void* key_norm;        // likewise
  const void* qkv[3];          // repacked: D -> H * head_dim, and twice D -> J * head_dim
  const void* output;          // repacked: H * head_dim -> D
  const void* mlp[3];          // repacked gate, up and down; null where there are experts
  const void* router;          // [E, D]
  const void* const* experts;  // as dbrxq_repacked_experts takes them; null where there are none
  int64_t expert_count;        // E
  int64_t active;              // experts of a token
  float expert_norm;  // the weights of a token's experts are divided by their p-norm of this p; 0: they are not
  int32_t reserved;
} dbrxq_decoder_layer;

typedef struct dbrxq_decoder {
  const dbrxq_decoder_layer* layers;
  const void* final_norm;  // [D]
  int64_t layer_count;
  int64_t hidden;
  int64_t heads;
  int64_t key_heads;        // a divisor of heads
  int64_t head_dim;         // a multiple of 16, up to 1024
  float scale;              // of the attention scores
  float clip;               // queries, keys and values are cut to -clip..clip first; infinity for none
  float eps;                // of all norms
  int32_t layer_norm;       // LayerNorm instead of RMSNorm
  int32_t activation;       // DBRXQ_SILU ..
  int32_t dtype;            // DBRXQ_FLOAT16 ..: of norms, routers, keys and values
  int32_t activation_bits;  // of linears, 8 or 16
  int32_t reserved;
} dbrxq_decoder;

// Keys and values of one layer, each [B, J, capacity, head_dim] of the decoder's dtype.
typedef struct dbrxq_decoder_cache {
  void* keys;
  void* values;
  int64_t capacity;  // at least past + T
} dbrxq_decoder_cache;

// y [B, T, D], normed at the end, from x [B, T, D], the new tokens' embeddings. The cache, one a layer, holds `past`
// positions of every sequence and gets T more; cosines and sines [T, head_dim] are those of the new positions, each
// half of them alike. Results do not depend on the number of threads.
DBRXQ_API int dbrxq_decode(const dbrxq_decoder* decoder, const dbrxq_decoder_cache* cache, int64_t sequences,
                           int64_t tokens, int64_t past, const float* cosines, const float* sines, const float* x,
                           float* y);

// ---------------------------------------------------------------------------------------------------------------
// Solver (cpu/solver; oracles: backend="torch" of quantize/solve/grid.py and ldlq.py, which give the same bits).
// Axes: K input channels in packed order, N output channels (any number), G groups. Row-major float matrices.
// Inputs must be finite. Results depend neither on the instruction set nor on the number of threads.

// Scales of one group x [rows, N] at `bits`: the least error = sum over columns of column_weights * sum over rows of
// row_weights * (x - nearest grid value)^2. column_weights [N] may be null (all 1).
// Out: scale_max, one half; scale_codes [N], 0..15; error.
DBRXQ_API int dbrxq_search_group(const float* x, int64_t rows, int64_t n, int bits, const float* row_weights,
                                 const float* column_weights, uint16_t* scale_max, uint8_t* scale_codes, double* error);

// errors [width_count, ceil(K / group_rows)]: the error of dbrxq_search_group for each run of group_rows rows of
// weight [K, N] (the last one shorter) at each of widths [width_count], rows weighted by pivots [K].
DBRXQ_API int dbrxq_error_table(const float* weight, int64_t k, int64_t n, const float* pivots,
                                const float* column_weights, const int64_t* widths, int64_t width_count,
                                int64_t group_rows, double* errors);

// Rounds a block of whole groups, with error feedback within the block. The scales of a group are searched on its
// targets, then the scale codes up to two steps from a column's best are tried by rounding the group with feedback,
// then the codes are searched along several paths (solver_paths.h). With DBRXQ_FAST the searched scales stay and every
// target goes to its nearest value; with DBRXQ_BEST the scale codes one step from the best are tried with paths, too.
// weight [rows, N]; coefficients [rows, rows], coefficients[c, j] = U[j, c] for j < c (the rest is not read); pivots
// [rows]; column_weights [N] or null, for the choice of maxima only; group_bits and group_rows [groups].
// In and out: errors [rows, N], going in the targets (weight plus the feedback of earlier blocks), coming out
// weight - dequantized; loss [N], to which sum over rows of pivots * (target - dequantized)^2 is added.
// Out: codes [rows, N], scale_codes [groups, N], scale_max [groups] half, dequantized [rows, N] half.
enum { DBRXQ_FAST = 0, DBRXQ_DEFAULT = 1, DBRXQ_BEST = 2 };
DBRXQ_API int dbrxq_solve_block(const float* weight, int64_t rows, int64_t n, const float* coefficients,
                                const float* pivots, const float* column_weights, const int64_t* group_bits,
                                const int64_t* group_rows, int64_t groups, int effort, float* errors, uint8_t* codes,
                                uint8_t* scale_codes, uint16_t* scale_max, uint16_t* dequantized, double* loss);

// ---------------------------------------------------------------------------------------------------------------
// CUDA (libdbrxq_cuda.so, csrc/cuda; oracles: tests/helpers/oracles_ops.py). Pointers are to device memory unless a host
// pointer is said; activations and workspaces are aligned to 16 bytes, the rest to its type. Calls only enqueue on
// `stream` (a cudaStream_t): no allocation, no synchronization, grids from sizes alone, so they can be captured in a
// graph. Weights are exact halves, products are summed in fp32, results depend on the numbers and sizes alone.
// Statuses above 1000 are 1000 + a cudaError_t.

enum { DBRXQ_FLOAT16 = 0, DBRXQ_BFLOAT16 = 1, DBRXQ_FLOAT32 = 2 };  // dtype of activations and results

DBRXQ_API int dbrxq_cuda_abi_version(void);
DBRXQ_API const char* dbrxq_cuda_status_text(int status);

// What the library was built for, as CMake names architectures, between commas: "80-real" machine code, "80-virtual"
// PTX, "80" both. "draft" for a build that is not meant to run; empty where the build did not say.
DBRXQ_API const char* dbrxq_cuda_targets(void);
// The CUDA version of the runtime inside the library, 1000 * major + 10 * minor; 0 in the tests' emulator.
DBRXQ_API int dbrxq_cuda_runtime_version(void);
// 0 if a GPU takes the library's code: an empty kernel is loaded there, or translated by the driver. Makes a context.
DBRXQ_API int dbrxq_cuda_probe(int device);

// One linear in device layout (cuda/tile_layout.h). A unit is 32 packed rows; U = ceil(K / 32). The groups of the file
// must have been checked. `bias` is that of dbrxq_linear.
typedef struct dbrxq_cuda_linear {
  const void* words;        // uint32 [sum of units * their bits, N], 16-byte aligned, made by dbrxq_cuda_repack
  const void* scale_codes;  // uint32 [G, N/8], the file's q_scale; 8-byte aligned
  const void* unit_scale;   // uint32 [U]      group of each unit in the low half, its scale_max (half) in the high
  const void* permutation;  // int32  [32 U]   input channel of each packed row, -1 beyond K
  const void* bias;         // half   [N], or null
  int64_t k;                // 1..65536, a multiple of 16 (of 32 unless the last group has 2 bits)
  int64_t n;                // a multiple of 32
  int64_t out_features;     // 1..n
  int64_t units;            // U
  int32_t first_unit[7];    // of the widths 8, 6, 5, 4, 3, 2; then U
  int32_t reserved;
} dbrxq_cuda_linear;

// words, as linear->words, from the file's q_weight [R, N] (linear: host; its sizes count, its pointers don't).
DBRXQ_API int dbrxq_cuda_repack(const dbrxq_cuda_linear* linear, const void* q_weight, void* words, void* stream);

// The file's q_weight [R, N] from linear->words, bit for bit (linear: host).
DBRXQ_API int dbrxq_cuda_unpack(const dbrxq_cuda_linear* linear, void* q_weight, void* stream);

// weight [K, out_features] half, input channels in their original order, bit for bit (linear: host).
DBRXQ_API int dbrxq_cuda_reconstruct(const dbrxq_cuda_linear* linear, void* weight, void* stream);

// y [T, out_features] = x [T, K] . weight + bias, both of `dtype` (linear: host). `workspace` holds the bytes that
// the first function says; nothing in it needs to be set or kept.
DBRXQ_API int dbrxq_cuda_linear_workspace(const dbrxq_cuda_linear* linear, int64_t tokens, int dtype, int64_t* bytes);
DBRXQ_API int dbrxq_cuda_linear_forward(const dbrxq_cuda_linear* linear, const void* x, int64_t tokens, int dtype,
                                        void* y, void* workspace, void* stream);

// The experts of a block: arrays of E linears in device memory, of equal sizes, without biases.
typedef struct dbrxq_cuda_experts {
  const dbrxq_cuda_linear* gate;  // hidden -> ffn
  const dbrxq_cuda_linear* up;    // hidden -> ffn
  const dbrxq_cuda_linear* down;  // ffn -> hidden
  int64_t experts;                // 1..1024
  int64_t hidden;
  int64_t ffn;
  int32_t activation;  // DBRXQ_SILU ..
  int32_t reserved;
} dbrxq_cuda_experts;

// y [T, hidden] = sum over a of top_k_weights[t, a] * down_e(activation(gate_e(x_t)) * up_e(x_t)), e =
// top_k_index[t, a], in a fixed order (block: host; x and y of `dtype`). An index outside 0..E-1 adds nothing.
DBRXQ_API int dbrxq_cuda_experts_workspace(const dbrxq_cuda_experts* block, int64_t tokens, int64_t active, int dtype,
                                           int64_t* bytes);
DBRXQ_API int dbrxq_cuda_experts_forward(const dbrxq_cuda_experts* block, const void* x, const int64_t* top_k_index,
                                         const float* top_k_weights, int64_t tokens, int64_t active, int dtype, void* y,
                                         void* workspace, void* stream);

// ---------------------------------------------------------------------------------------------------------------
// Decoder on a GPU (cuda/decoder; oracles: the layers of transformers, dbrxq_decode): all layers of a model for up to 8
// new tokens in all, of B sequences. Activations are fp32 throughout. What changes from step to step is in device memory,
// so a step can be captured once a shape and launched again with other tokens, positions and caches.
// Axes: B sequences, T new tokens of each, D hidden, H query heads, J key heads.

// One layer, as dbrxq_decoder_layer. Host pointers: the linears and the experts.
typedef struct dbrxq_cuda_decoder_layer {
  const void* attention_norm;  // [D] of the decoder's dtype, as all norms and the router; 16-byte aligned
  const void* mlp_norm;        // likewise
  const void* query_norm;      // [head_dim], or null
  const void* key_norm;        // likewise
  const dbrxq_cuda_linear* qkv[3];
  const dbrxq_cuda_linear* output;
  const dbrxq_cuda_experts* experts;  // of a dense layer: one, without a router
  const void* router;                 // [E, D], or null
  int64_t active;                     // experts of a token
  float expert_norm;                  // as in dbrxq_decoder_layer
  int32_t reserved;
} dbrxq_cuda_decoder_layer;

typedef struct dbrxq_cuda_decoder {
  const dbrxq_cuda_decoder_layer* layers;  // host
  const void* embedding;                   // [vocabulary, D]
  const void* final_norm;                  // [D], 16-byte aligned
  const dbrxq_cuda_linear* head;           // host: D -> vocabulary, or null: no sampling
  const float* cosines;                    // [positions, head_dim], for all positions that a cache has room for
  const float* sines;                      // likewise
  int64_t layer_count;
  int64_t hidden;
  int64_t vocabulary;
  int64_t heads;
  int64_t key_heads;   // a divisor of heads
  int64_t head_dim;    // a multiple of 16, up to 256
  float scale;         // of the attention scores
  float clip;          // as in dbrxq_decoder
  float eps;           // of all norms
  int32_t layer_norm;  // LayerNorm instead of RMSNorm
  int32_t dtype;       // DBRXQ_FLOAT16 ..: of embedding, norms, routers, keys, values and states
  int32_t cache_bits;  // 16: keys and values are of `dtype`; 8: bytes, with scales
} dbrxq_cuda_decoder;

// Keys and values of one layer: [B, J, capacity, head_dim]. With 8 bits they are int8, times a scale [B, J, capacity].
typedef struct dbrxq_cuda_cache {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int64_t capacity;  // a step for which it has no room leaves keys, values and the layer's results as they are
} dbrxq_cuda_cache;

// How the next token is chosen from its logits.
typedef struct dbrxq_cuda_sampling {
  float temperature;  // 0: the likeliest token, the first of equal ones
  float top_p;        // of the chance of the tokens that top_k leaves, the fewest that have this share; 1: all
  int64_t top_k;      // the likeliest this many; 0: all. Tokens within 2e-6 of the last one's logit stay, too
  uint64_t seed;      // with sequence and position it decides
} dbrxq_cuda_sampling;

// Device pointers but for the numbers. `workspace` holds the bytes that dbrxq_cuda_decode_workspace says, and is zeroed
// before its first step; steps of all shapes may share it, one after another.
typedef struct dbrxq_cuda_step {
  int64_t* tokens;                // [B, T]
  int32_t* past;                  // [B]: positions that each sequence has in the cache
  const dbrxq_cuda_cache* cache;  // [layers]
  void* states;                   // out [B, T, D] of the decoder's dtype, behind the last norm; null: no states
  void* workspace;
  float* logits;                        // [B, vocabulary] working memory of `sampling`
  const dbrxq_cuda_sampling* sampling;  // null: no next tokens. Else T is 1, and the step
  int64_t* generated;                   // [B, room]: puts the next token of b at made[b], and into `tokens`,
  int32_t* made;                        // [B]: adds one
  int64_t room;                         // and adds one to `past`: another step can follow at once
  int64_t sequences;                    // B
  int64_t new_tokens;                   // T; B T is 8 at most
} dbrxq_cuda_step;

DBRXQ_API int dbrxq_cuda_decode_workspace(const dbrxq_cuda_decoder* decoder, int64_t sequences, int64_t tokens,
                                          int64_t* bytes);
DBRXQ_API int dbrxq_cuda_decode(const dbrxq_cuda_decoder* decoder, const dbrxq_cuda_step* step, void* stream);

// A graph (a cudaGraphExec_t) of what dbrxq_cuda_decode would enqueue; it keeps every pointer in `decoder` and `step`.
// The shape must have run once by dbrxq_cuda_decode.
DBRXQ_API int dbrxq_cuda_decode_capture(const dbrxq_cuda_decoder* decoder, const dbrxq_cuda_step* step, void** graph);
DBRXQ_API int dbrxq_cuda_graph_launch(void* graph, void* stream);
DBRXQ_API int dbrxq_cuda_graph_free(void* graph);

#ifdef __cplusplus
}
#endif
