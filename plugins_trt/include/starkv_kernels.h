/* SPDX-License-Identifier: Apache-2.0 */
/*
 * starkv's kernels behind a C ABI: no TensorRT, no PyTorch, any device pointer.
 *
 * The meaning of every operator is its ONNX definition (starkv/onnx_compress.py, onnx_ops.py,
 * onnx_quantized_kv.py). Every function
 *   - only launches on the given stream: it allocates nothing, never waits for the device and never reads
 *     device memory on the host, so that it can be captured in a CUDA graph;
 *   - checks what the host can see and returns a starkv_status; nothing is launched unless all is well;
 *   - takes contiguous row-major tensors, each aligned to 16 bytes.
 *
 * The same sources built for the CPU (libstarkv_kernels_cpu) run the very same kernels on host memory, thread
 * by thread: far too slow for use, made for tests. There every stream is ignored.
 *
 * Symbols: L layers, B sequences, G KV heads, H query heads, W observation window, C rows of capacity, D head
 * dim, S slots (or, in attention, new tokens), E rows of a slot, V length of a pattern, P rows of a table of
 * cosines.
 */
#ifndef STARKV_KERNELS_H
#define STARKV_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define STARKV_API __declspec(dllexport)
#else
#define STARKV_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with every change of this file that breaks a caller. */
#define STARKV_ABI_VERSION 4

typedef enum starkv_status {
    STARKV_OK = 0,
    STARKV_ERROR_NULL_POINTER = 1, /* a required pointer is null */
    STARKV_ERROR_MISALIGNED = 2,   /* a pointer is no multiple of 16 bytes */
    STARKV_ERROR_DTYPE = 3,        /* an unknown or unsupported element type */
    STARKV_ERROR_HEAD_DIM = 4,     /* D is none of 64, 80, 96, 128, 256; FullAttention's are its own */
    STARKV_ERROR_WINDOW = 5,       /* W is not in 1 ... 64 */
    STARKV_ERROR_HEADS = 6,        /* H is no multiple of G, or a count of heads is out of range */
    STARKV_ERROR_POOLING = 7,      /* unknown pooling, or a kernel that is even or not in 1 ... 63 */
    STARKV_ERROR_SHAPE = 8,        /* another dimension is out of range, or two that must agree do not */
    STARKV_ERROR_WORKSPACE = 9,    /* the workspace is too small */
    STARKV_ERROR_OVERLAP = 10,     /* source and destination overlap, but are not the same rows */
    STARKV_ERROR_LAUNCH = 11,      /* CUDA refused a launch: no device, or no code for it */
    STARKV_ERROR_ARGUMENT = 12     /* a scalar argument is out of range */
} starkv_status;

typedef enum starkv_dtype { STARKV_FLOAT32 = 0, STARKV_FLOAT16 = 1, STARKV_BFLOAT16 = 2 } starkv_dtype;

typedef enum starkv_pooling { STARKV_AVGPOOL = 0, STARKV_MAXPOOL = 1 } starkv_pooling;

/* "STARKV_ERROR_HEAD_DIM"; never null. */
STARKV_API const char* starkv_status_name(int status);
/* What it means and what to do, one sentence; never null. */
STARKV_API const char* starkv_status_message(int status);
STARKV_API int starkv_abi_version(void);
/* "cuda" or "cpu": where pointers must lie. */
STARKV_API const char* starkv_device_kind(void);

/* ---- Compress: STaR-KV's scoring, budgets of layers, selection, compaction; all layers in one call ---- */

typedef struct starkv_compress_shape {
    int32_t layers;           /* L */
    int32_t sequences;        /* B */
    int32_t kv_heads;         /* G, at most 64 */
    int32_t query_heads;      /* H */
    int32_t window;           /* W */
    int32_t head_dim;         /* D */
    int32_t capacity;         /* C, at most 2^24 */
    int32_t slots;            /* S */
    int32_t slot_capacity;    /* E */
    int32_t pattern_capacity; /* V */
    int32_t dtype;            /* starkv_dtype of k, v, q_window, dst_k, dst_v */
    int32_t pooling;          /* starkv_pooling */
    int32_t pooling_kernel;   /* odd */
} starkv_compress_shape;

/* In the order of the operator's definition. A sequence is compressed in all layers or in none. It cannot be
 * where in any layer kv_len <= W or kv_len > C, the newest screenshot does not lie before the window or has
 * more cells than V, a layer's budget exceeds its rows or the slot's E, or its slot is not in 0 ... S - 1:
 * then it keeps nothing (new_len is 0), nothing is written into its slot, and its state stays. */
typedef struct starkv_compress_buffers {
    const void* k;            /* [L,B,G,C,D]; rows from kv_len on are never used */
    const void* v;            /* [L,B,G,C,D] */
    const void* q_window;     /* [L,B,H,W,D] */
    const float* hidden_norm; /* [L,B,C] */
    const int32_t* kv_len;    /* [L,B] */
    const int32_t* row_meta;  /* [L,B,C,4] */
    const int32_t* frame;     /* [5] */
    const float* parameters;  /* [23] */
    const int64_t* limits;    /* [3] */
    const float* mi_ema;      /* [L,B,G] */
    const float* pattern_ema; /* [L,B,G,V] */
    const float* temperature; /* [L,B] */
    const int32_t* slot;      /* [B]; must be 0, 1, 2 ... where dst is the source itself */
    void* dst_k;              /* [L,S,G,E,D]; may be k itself, then S = B and E = C */
    void* dst_v;              /* [L,S,G,E,D]; likewise v */
    int32_t* dst_meta;        /* [L,S,E,4]; likewise row_meta */
    int32_t* new_len;         /* [L,B] */
    int64_t* rows;            /* [L,B,1,E], ascending, -1 behind the last; may be null */
    float* scores;            /* [L,B,C], 0 outside the past; may be null */
    float* stages;            /* [L,B,4,C]; may be null */
    float* new_mi_ema;        /* [L,B,G]; may be mi_ema itself */
    float* new_pattern_ema;   /* [L,B,G,V]; may be pattern_ema itself */
    float* new_temperature;   /* [L,B]; may be temperature itself */
} starkv_compress_buffers;

/* Bytes of workspace for starkv_compress. */
STARKV_API int starkv_compress_workspace(const starkv_compress_shape* shape, size_t* bytes);

STARKV_API int starkv_compress(const starkv_compress_shape* shape, const starkv_compress_buffers* buffers,
                               void* workspace, size_t workspace_bytes, void* stream);

/* ---- KVAttention: append new rows to a cache and attend to all of it ---- */

typedef struct starkv_attention_shape {
    int32_t sequences;   /* B */
    int32_t new_tokens;  /* S, at most 2^21 */
    int32_t query_heads; /* H */
    int32_t kv_heads;    /* G, at most 64 */
    int32_t head_dim;    /* D */
    int32_t capacity;    /* C, at most 2^24 */
    int32_t dtype;       /* STARKV_FLOAT16 or STARKV_BFLOAT16 */
} starkv_attention_shape;

/* Sequence b holds kv_len[b] rows; the S new ones are written behind them, and new query s sees the rows
 * 0 ... kv_len[b] + s. A sequence with kv_len < 0 or kv_len + S > C is left alone and its output set to 0. */
typedef struct starkv_attention_buffers {
    const void* q;         /* [B,S,H*D] */
    const void* k;         /* [B,S,G*D] */
    const void* v;         /* [B,S,G*D] */
    const void* past_k;    /* [B,G,C,D] */
    const void* past_v;    /* [B,G,C,D] */
    const int32_t* kv_len; /* [B] */
    void* present_k;       /* [B,G,C,D]; past_k itself (nothing is copied), or apart from it */
    void* present_v;       /* likewise */
    void* out;             /* [B,S,H*D] */
} starkv_attention_buffers;

/* Bytes of workspace for starkv_attention: 0 unless S is 1; null will do then. */
STARKV_API int starkv_attention_workspace(const starkv_attention_shape* shape, size_t* bytes);

STARKV_API int starkv_attention(const starkv_attention_shape* shape, const starkv_attention_buffers* buffers,
                                void* workspace, size_t workspace_bytes, void* stream);

/* ---- QuantizedKVAttention: the same for one new token, with a cache of 8-bit or 4-bit codes ---- */

typedef struct starkv_quantized_attention_shape {
    int32_t sequences;        /* B */
    int32_t query_heads;      /* H */
    int32_t kv_heads;         /* G, at most 64 */
    int32_t head_dim;         /* D */
    int32_t capacity;         /* C, at most 2^24 */
    int32_t table_rows;       /* P, at most 2^20 */
    int32_t bits;             /* of a code, 8 or 4; a row has R = D * bits / 8 bytes */
    int32_t dtype;            /* starkv_dtype of q, k, v, out */
    int32_t mrope_section[3]; /* pairs of columns that rotate by t, h, w, in this order; together D / 2 */
} starkv_quantized_attention_shape;

/* Keys lie in the cache rotated, without their projection's bias; values without theirs. The projection's
 * bias, rotated to a position p = (t, h, w), is called R(p) k_bias: with i < D / 2, and r the component of p
 * that pair i rotates by,
 *   column i:          k_bias[i] * cos_table[r, i] - k_bias[i + D/2] * sin_table[r, i]
 *   column i + D / 2:  k_bias[i + D/2] * cos_table[r, i] + k_bias[i] * sin_table[r, i]
 * The new row's codes are those of (k - R(p) k_bias) / k_scale and (v - v_bias) / v_scale, every operation
 * rounded to float32 in the order written. A code is the nearest integer, of two equally near ones the even
 * one, within -128 ... 127 (bits 8, one signed byte) or -8 ... 7 (bits 4, of which two share a byte: the even
 * column's code plus 8 in the lower half, the odd one's in the upper).
 * Sequence b holds kv_len[b] rows, and row kv_len[b] of its positions is the new row's. A query sees rows 0
 * ... kv_len[b]: its score of a row is (q * codes * k_scale + q * R(p) k_bias) / sqrt(D), and out is the sum
 * of softmax * codes * v_scale, plus v_bias.
 * A sequence with kv_len < 0 or kv_len >= C, or whose new row has a position outside 0 ... P - 1, is left
 * alone and its output set to 0. An older row with such a position makes the output NaN. Positions that
 * exceed the greatest component of the new row's are slow: no model has them. */
typedef struct starkv_quantized_attention_buffers {
    const void* q;            /* [B,1,H*D], rotated */
    const void* k;            /* [B,1,G*D], rotated, with its bias */
    const void* v;            /* [B,1,G*D], with its bias */
    const void* past_k;       /* [B,G,C,R] codes */
    const void* past_v;       /* [B,G,C,R] codes */
    const int32_t* kv_len;    /* [B] */
    const int32_t* positions; /* [B,C,3] */
    const float* k_scale;     /* [G*D] */
    const float* v_scale;     /* [G*D] */
    const float* k_bias;      /* [G*D] */
    const float* v_bias;      /* [G*D] */
    const float* cos_table;   /* [P,D/2] */
    const float* sin_table;   /* [P,D/2] */
    void* present_k;          /* [B,G,C,R]; past_k itself (nothing is copied), or apart from it */
    void* present_v;          /* likewise */
    void* out;                /* [B,1,H*D] */
} starkv_quantized_attention_buffers;

/* Bytes of workspace for starkv_quantized_attention. */
STARKV_API int starkv_quantized_attention_workspace(const starkv_quantized_attention_shape* shape,
                                                    size_t* bytes);

STARKV_API int starkv_quantized_attention(const starkv_quantized_attention_shape* shape,
                                          const starkv_quantized_attention_buffers* buffers, void* workspace,
                                          size_t workspace_bytes, void* stream);

/* ---- Rows of a float cache into a slot of a cache of codes, and back; all layers in one call ---- */

typedef struct starkv_code_rows_shape {
    int32_t layers;           /* L */
    int32_t kv_heads;         /* G, at most 64 */
    int32_t head_dim;         /* D */
    int32_t capacity;         /* C, of the float cache of one sequence; at most 2^24 */
    int32_t slots;            /* S, of the cache of codes */
    int32_t slot_capacity;    /* E, at most 2^24 */
    int32_t slot;             /* the one in question, 0 ... S - 1 */
    int32_t table_rows;       /* P, at most 2^20 */
    int32_t bits;             /* of a code, 8 or 4; a row has R = D * bits / 8 bytes */
    int32_t dtype;            /* starkv_dtype of k, v */
    int32_t mrope_section[3]; /* as in QuantizedKVAttention */
} starkv_code_rows_shape;

/* Codes, scales, biases and R(p) are those of QuantizedKVAttention, to the bit: a row has the codes that it
 * would have got if it had been appended there. Layer l has lengths[l] rows; of both caches and of positions
 * only they, of the slot only, are read or written. Where lengths[l] is negative or above C or E, nothing of
 * the layer is. */
typedef struct starkv_code_rows_buffers {
    void* k;                  /* [L,1,G,C,D], rotated, with its bias */
    void* v;                  /* [L,1,G,C,D], with its bias */
    const int32_t* lengths;   /* [L] */
    const int32_t* positions; /* [L,S,E,3]: (t, h, w) of the rows of codes */
    const float* k_scale;     /* [L,G*D] */
    const float* v_scale;     /* [L,G*D] */
    const float* k_bias;      /* [L,G*D] */
    const float* v_bias;      /* [L,G*D] */
    const float* cos_table;   /* [P,D/2] */
    const float* sin_table;   /* [P,D/2] */
    void* k_codes;            /* [L,S,G,E,R] */
    void* v_codes;            /* [L,S,G,E,R] */
    int32_t* wrong_rows;      /* [L]; only quantizing needs it */
} starkv_code_rows_buffers;

/* k, v become k_codes, v_codes. wrong_rows[l] becomes the number of rows of layer l that hold, in any head of
 * k or v, what is not finite, or whose position is outside 0 ... P - 1; -1 where lengths[l] makes no sense. A
 * wrong row's codes stand for nothing: they stay as they were if its position is outside, and otherwise are
 * the lowest for NaN and the outermost for what is infinite. */
STARKV_API int starkv_quantize_rows(const starkv_code_rows_shape* shape,
                                    const starkv_code_rows_buffers* buffers, void* stream);

/* k_codes, v_codes become k = codes * k_scale + R(p) k_bias and v = codes * v_scale + v_bias, every operation
 * rounded to float32 in the order written and the result to dtype. Keys whose position is outside 0 ... P - 1
 * become NaN. wrong_rows is not used and may be null. */
STARKV_API int starkv_dequantize_rows(const starkv_code_rows_shape* shape,
                                      const starkv_code_rows_buffers* buffers, void* stream);

/* ---- FullAttention: every token of a sequence attends to every other ---- */

typedef struct starkv_full_attention_shape {
    int32_t sequences; /* B */
    int32_t tokens;    /* N, at most 2^21 */
    int32_t heads;     /* H */
    int32_t head_dim;  /* D: 32, 64, 80, 96 or 128 */
    int32_t dtype;     /* STARKV_FLOAT16 or STARKV_BFLOAT16 */
} starkv_full_attention_shape;

/* Bytes of workspace for starkv_full_attention: 0, whatever the shape, if it is one. */
STARKV_API int starkv_full_attention_workspace(const starkv_full_attention_shape* shape, size_t* bytes);

/* q, k, v and out: [B,N,H*D]. */
STARKV_API int starkv_full_attention(const starkv_full_attention_shape* shape, const void* q, const void* k,
                                     const void* v, void* out, void* stream);

/* ---- What decoding needs beside the engine, so that one token costs one copy of 4 bytes to the host ---- */

/* out[i] = table[ids[i]]: rows of an embedding [vocabulary, width]; ids outside it give rows of 0. */
STARKV_API int starkv_embedding_gather(const void* table, const int32_t* ids, void* out, int32_t count,
                                       int32_t vocabulary, int32_t width, int32_t dtype, void* stream);

/* ids[b] = index of the largest of logits [B, vocabulary]; the lowest of equal ones; NaN never wins, and a
 * row of NaN gives 0. */
STARKV_API int starkv_argmax(const float* logits, int32_t* ids, int32_t sequences, int32_t vocabulary,
                             void* stream);

/* Nucleus sampling. Per sequence: temperature[b] > 0, top_p[b] in (0, 1], uniform[b] in [0, 1) drawn by the
 * caller. A token weighs exp((logit - largest) / temperature), rounded to a multiple of 2^-40, so that sums
 * are exact and every device chooses the same token (starkv/kernels/sampling_reference.py). The larger
 * weights come first and of equal ones the lower id: the kept set is the shortest beginning whose sum reaches
 * top_p of all. Of it, in order of ids, the first whose running sum exceeds uniform times what is kept is
 * chosen. A temperature of 0 or less is argmax. NaN weighs nothing. At most 2^22 tokens. */
STARKV_API int starkv_sample_top_p(const float* logits, const float* temperature, const float* top_p,
                                   const float* uniform, int32_t* ids, int32_t sequences, int32_t vocabulary,
                                   void* stream);

#ifdef __cplusplus
}
#endif
#endif
