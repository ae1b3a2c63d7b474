// W itself: written out whole, or rebuilt tile by tile in shared memory for products with many tokens.

struct ReconstructParameters {
    u64 weight;
    u64 out;
    u32 out_type;
    u32 unused;
};

// Sums the values of the spikes of 4 rows, from `first_row` on, and 128 columns, from `first_col` on, in shared memory of this warp, 4 x 128,
// which it returns. The warp walks the list of the rows' tile up to there.
DEVICE const float* gather_spikes(const Weight& weight, u32 first_row, u32 first_col) {
    DYNAMIC_SHARED(shared);
    const u32 lane = threadIdx.x % 32, first = first_row % SPIKE_ROWS;
    float* own = (float*)shared + threadIdx.x / 32 * 4 * UNIT_COLS;
    for (u32 i = lane; i < 4 * UNIT_COLS; i += 32) {
        own[i] = 0;
    }
    __syncwarp();
    const SpikeTile tile = spike_tile(weight, first_row / SPIKE_ROWS);
    u32 col_before = 0;
    for (u64 at = 0; at < tile.count && col_before < first_col + UNIT_COLS; at += 32) {
        const u32 entry = spike_entry(tile, at + lane), gap = spike_gap(entry);
        const u32 crossed = (u32)warp_sum((int)gap);
        if (col_before + crossed >= first_col) {
            const u32 r = entry % SPIKE_ROWS - first, c = col_before + warp_prefix(gap) - first_col;
            // Below the first ones, the unsigned differences are large.
            const bool live = r < 4 && c < UNIT_COLS;
            in_turn(live, r * UNIT_COLS + c, [&]() { own[r * UNIT_COLS + c] += spike_value(weight, entry); });
        }
        col_before += crossed;
    }
    return own;
}

// out = W, rows x cols. Sums over rank, then over planes, in f32; then come the spikes.
// Grid: row tiles x units. Block: 4 warps of 4 rows each; a lane does 4 columns. Shared memory: for each warp the spikes of its rows and
// the unit (4 x 4 x 128 floats, 8 KiB).
KERNEL(128, 4) reconstruct(PARAMETERS ReconstructParameters p) {
    const Weight& weight = *(const Weight*)p.weight;
    const u32 lane = threadIdx.x % 32, first = threadIdx.x / 32 * 4;
    const u32 tile = blockIdx.x, unit = blockIdx.y, chunk = unit / CHUNK_UNITS;
    const u32 units = weight.units, width = chunk_width(units, chunk), col = unit * UNIT_COLS + lane * 4;
    float w[4][4] = {};
#pragma unroll 1
    for (u32 index = 0; index < weight.products; index++) {
        const Product& product = weight.product[index];
        const u8* u = (const u8*)product.coefficients + (u64)tile * product.coefficients_stride;
        float magnitude[4][4] = {};
#pragma unroll 1
        for (u32 k = 0; k < product.rank; k++) {
            float v[4];
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                v[c] = load_factor((const void*)product.basis, product.basis_scales, (u64)k * units * UNIT_COLS + col + c, k);
            }
#pragma unroll
            for (u32 r = 0; r < 4; r++) {
                const float coefficient = load_factor(u, product.coefficient_scales, (first + r) * product.rank + k, k);
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    magnitude[r][c] += coefficient * v[c];
                }
            }
        }
        const u8* signs = chunk_signs(product, units, tile, chunk) + unit % CHUNK_UNITS * 16 + lane / 2;
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            const u32 bits = (u32)signs[(first + r) * width * 16] >> (lane % 2 * 4);
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                w[r][c] += bits >> c & 1 ? magnitude[r][c] : -magnitude[r][c];
            }
        }
    }
    if (weight.spikes.words != 0) {
        const u32 first_row = tile * TILE_ROWS + first;
        const float* values = gather_spikes(weight, first_row, unit * UNIT_COLS);
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            const float row_unit = spike_row_unit(weight, first_row + r);
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                w[r][c] += values[r * UNIT_COLS + lane * 4 + c] * (row_unit * spike_col_unit(weight, col + c));
            }
        }
    }
#pragma unroll
    for (u32 r = 0; r < 4; r++) {
        const u32 row = tile * TILE_ROWS + first + r;
        if (row < weight.rows) {
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                if (col + c < weight.cols) {
                    store_value((void*)p.out, p.out_type, (u64)row * weight.cols + col + c, w[r][c]);
                }
            }
        }
    }
}

struct BatchParameters {
    u64 weight;
    u64 x;
    u64 y;
    u32 tokens;
    u32 x_type;   // F16 or BF16
    u32 y_type;
    u32 aligned;  // 1: rows of x begin at multiples of 16 bytes
};

constexpr u32 BATCH_ROWS = 64;
constexpr u32 BATCH_TOKENS = 128;
constexpr u32 BATCH_DEPTH = 64;                // columns rebuilt at a time
constexpr u32 BATCH_STRIDE = BATCH_DEPTH + 8;  // halves from a row to the next: fragments are read without bank conflicts

// A value with the sign that bit `at` of `signs` gives it: 1 = +1.
DEVICE float with_sign(float value, u32 signs, u32 at) {
    return __uint_as_float(__float_as_uint(value) ^ (~(signs >> at) << 31));
}

// Two values of a basis in f16, k and k + 1 at one column, as an mma takes them; zero from `rank` on.
DEVICE u32 basis_pair(const u16* basis, u32 stride, u32 rank, u32 k, u32 col) {
    const u32 low = k < rank ? basis[(u64)k * stride + col] : 0;
    const u32 high = k + 1 < rank ? basis[(u64)(k + 1) * stride + col] : 0;
    return low | high << 16;
}

// The same of the coefficients of a row.
DEVICE u32 coefficient_pair(const u16* u, u32 rank, u32 k, u32 row) {
    const u32 low = k < rank ? u[row * rank + k] : 0;
    const u32 high = k + 1 < rank ? u[row * rank + k + 1] : 0;
    return low | high << 16;
}

// Rebuilds 16 rows (a tile) x 32 columns of W from `col` on; one warp. w[n] is laid out as the result of an mma: rows g, g + 8 and columns
// 8n + 2t, 8n + 2t + 1 of the 32.
DEVICE void rebuild(const Product* products, u32 n_products, u32 units, u32 tile, u32 col, float (&w)[4][4]) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 chunk = col / CHUNK_COLS, row_bytes = chunk_width(units, chunk) * 16, stride = units * UNIT_COLS;
    float v[8] = {};
#pragma unroll 1
    for (u32 index = 0; index < n_products; index++) {
        const Product& product = products[index];
        const u8* signs = chunk_signs(product, units, tile, chunk) + col % CHUNK_COLS / 8;
        // One word for each of the two rows, shifted so that this lane's columns are bits 8n and 8n + 1.
        const u32 word[2] = {*(const u32*)(signs + g * row_bytes) >> 2 * t, *(const u32*)(signs + (g + 8) * row_bytes) >> 2 * t};
        const u8* u = (const u8*)product.coefficients + (u64)tile * product.coefficients_stride;
        if (product.rank == 1) {
            // Planes with one basis need it once.
            if (index == 0 || products[index - 1].operand != product.operand) {
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    v[i] = load_factor((const void*)product.basis, product.basis_scales, col + i / 2 * 8 + 2 * t + i % 2, 0);
                }
            }
            const float coefficient[2] = {load_factor(u, product.coefficient_scales, g, 0),
                                          load_factor(u, product.coefficient_scales, g + 8, 0)};
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 at = 0; at < 4; at++) {
                    w[n][at] += with_sign(coefficient[at / 2], word[at / 2], 8 * n + at % 2) * v[2 * n + at % 2];
                }
            }
        } else if (product.basis_scales == 0 && product.coefficient_scales == 0) {
            // U V is itself a product for tensor cores: halves in, f32 out, nothing lost.
            const u16* halves = (const u16*)u;
            const u16* basis = (const u16*)product.basis;
            u32 a[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                a[i] = coefficient_pair(halves, product.rank, 2 * t + i / 2 * 8, g + i % 2 * 8);
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                float magnitude[4] = {};
                const u32 b0 = basis_pair(basis, stride, product.rank, 2 * t, col + 8 * n + g);
                const u32 b1 = basis_pair(basis, stride, product.rank, 2 * t + 8, col + 8 * n + g);
                mma_half(magnitude, a, b0, b1);
#pragma unroll
                for (u32 at = 0; at < 4; at++) {
                    w[n][at] += with_sign(magnitude[at], word[at / 2], 8 * n + at % 2);
                }
            }
        } else {
            float magnitude[4][4] = {};
#pragma unroll 1
            for (u32 k = 0; k < product.rank; k++) {
                const float coefficient[2] = {load_factor(u, product.coefficient_scales, g * product.rank + k, k),
                                              load_factor(u, product.coefficient_scales, (g + 8) * product.rank + k, k)};
#pragma unroll
                for (u32 n = 0; n < 4; n++) {
#pragma unroll
                    for (u32 c = 0; c < 2; c++) {
                        const u64 at = (u64)k * stride + col + 8 * n + 2 * t + c;
                        const float value = load_factor((const void*)product.basis, product.basis_scales, at, k);
                        magnitude[n][c] += coefficient[0] * value;
                        magnitude[n][c + 2] += coefficient[1] * value;
                    }
                }
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
#pragma unroll
                for (u32 at = 0; at < 4; at++) {
                    w[n][at] += with_sign(magnitude[n][at], word[at / 2], 8 * n + at % 2);
                }
            }
        }
    }
}

// y = x Wᵀ for many tokens. 64 columns of 64 rows of W are rebuilt in f32, rounded to the type of x, and multiplied with 128 tokens:
// each weight is rebuilt once for 128 tokens.
// Grid: rows / 64 x tokens / 128, rounded up. Block: 8 warps; to rebuild, 4 along rows x 2 along columns; to multiply, 2 along rows x 4
// along tokens, 32 x 32 results each.
// Shared memory: (64 + 128) x 72 x 2 bytes, and the products' table (4 KiB).
template <bool BFLOAT>
DEVICE void batch(const BatchParameters& p) {
    DYNAMIC_SHARED(shared);
    u16* w_tile = (u16*)shared;
    u16* x_tile = w_tile + BATCH_ROWS * BATCH_STRIDE;
    Product* products = (Product*)(x_tile + BATCH_TOKENS * BATCH_STRIDE);
    const Weight& weight = *(const Weight*)p.weight;
    const u32 rows = weight.rows, cols = weight.cols, units = weight.units, n_products = weight.products;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 warp_row = warp / 4 * 32, warp_token = warp % 4 * 32;
    const u32 first_row = blockIdx.x * BATCH_ROWS, first_token = blockIdx.y * BATCH_TOKENS;
    for (u32 at = threadIdx.x; at < n_products * (u32)(sizeof(Product) / 16); at += blockDim.x) {
        ((uint4*)products)[at] = ((const uint4*)weight.product)[at];
    }
    __syncthreads();

    const u32 my_rows = warp / 2 * TILE_ROWS, my_cols = warp % 2 * 32, tile = (first_row + my_rows) / TILE_ROWS;
    float acc[2][4][4] = {};
#pragma unroll 1
    for (u32 depth = 0; depth < units * UNIT_COLS; depth += BATCH_DEPTH) {
        // x: two threads a token, 32 columns each.
        {
            const u32 token = threadIdx.x / 2, from = threadIdx.x % 2 * 32;
            u16* to = x_tile + token * BATCH_STRIDE + from;
            const bool have = first_token + token < p.tokens;
            const u16* x = (const u16*)p.x + (u64)(first_token + token) * cols + depth + from;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 col = depth + from + 8 * i;
                uint4 eight = {0, 0, 0, 0};
                if (have && p.aligned != 0 && col + 8 <= cols) {
                    eight = *(const uint4*)(x + 8 * i);
                } else if (have) {
                    u32 words[4] = {};
#pragma unroll
                    for (u32 c = 0; c < 8; c++) {
                        words[c / 2] |= col + c < cols ? (u32)x[8 * i + c] << (c % 2 * 16) : 0;
                    }
                    eight = {words[0], words[1], words[2], words[3]};
                }
                *(uint4*)(to + 8 * i) = eight;
            }
        }
        float w[4][4] = {};
        if (tile * TILE_ROWS < rows) {
            rebuild(products, n_products, units, tile, depth + my_cols, w);
        }
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 low = BFLOAT ? float_to_bfloat(w[n][2 * h]) : float_to_half(w[n][2 * h]);
                const u32 high = BFLOAT ? float_to_bfloat(w[n][2 * h + 1]) : float_to_half(w[n][2 * h + 1]);
                *(u32*)(w_tile + (my_rows + g + 8 * h) * BATCH_STRIDE + my_cols + 8 * n + 2 * t) = low | high << 16;
            }
        }
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < BATCH_DEPTH; k += 16) {
            u32 a[2][4];
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                const u16* from = w_tile + (warp_row + i * 16 + g) * BATCH_STRIDE + k + 2 * t;
                a[i][0] = *(const u32*)from;
                a[i][1] = *(const u32*)(from + 8 * BATCH_STRIDE);
                a[i][2] = *(const u32*)(from + 8);
                a[i][3] = *(const u32*)(from + 8 * BATCH_STRIDE + 8);
            }
#pragma unroll
            for (u32 n = 0; n < 4; n++) {
                const u16* from = x_tile + (warp_token + n * 8 + g) * BATCH_STRIDE + k + 2 * t;
                const u32 b0 = *(const u32*)from, b1 = *(const u32*)(from + 8);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    if (BFLOAT) {
                        mma_bfloat(acc[i][n], a[i], b0, b1);
                    } else {
                        mma_half(acc[i][n], a[i], b0, b1);
                    }
                }
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
#pragma unroll
        for (u32 n = 0; n < 4; n++) {
#pragma unroll
            for (u32 at = 0; at < 4; at++) {
                const u32 row = first_row + warp_row + i * 16 + g + at / 2 * 8;
                const u32 token = first_token + warp_token + n * 8 + 2 * t + at % 2;
                if (row < rows && token < p.tokens) {
                    store_value((void*)p.y, p.y_type, (u64)token * rows + row, acc[i][n][at]);
                }
            }
        }
    }
}

KERNEL(256, 2) batch_half(PARAMETERS BatchParameters p) { batch<false>(p); }
KERNEL(256, 2) batch_bfloat(PARAMETERS BatchParameters p) { batch<true>(p); }
