// W itself: written out whole, or rebuilt tile by tile in shared memory for products with many tokens.

struct ReconstructParameters {
    u64 weight;
    u64 out;
    u32 out_type;
    u32 unused;
};

// out = W, rows x cols. Sums over rank, then over planes, in f32.
// Grid: row tiles x units. Block: 4 warps of 4 rows each; a lane does 4 columns. No shared memory.
KERNEL(128, 4) reconstruct(PARAMETERS ReconstructParameters p) {
    const Weight& weight = *(const Weight*)p.weight;
    const u32 lane = threadIdx.x % 32, first = threadIdx.x / 32 * 4;
    const u32 tile = blockIdx.x, unit = blockIdx.y, chunk = unit / CHUNK_UNITS;
    const u32 units = weight.units, width = chunk_width(units, chunk), col = unit * UNIT_COLS + lane * 4;
    float w[4][4] = {};
    for (u32 index = 0; index < weight.products; index++) {
        const Product& product = weight.product[index];
        const u8* u = (const u8*)product.coefficients + (u64)tile * product.coefficients_stride;
        float magnitude[4][4] = {};
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

// y = x Wᵀ for many tokens. 64 columns of 64 rows of W are rebuilt in f32, rounded to the type of x, and multiplied with 128 tokens:
// each weight is rebuilt once for 128 tokens.
// Grid: rows / 64 x tokens / 128, rounded up. Block: 8 warps, 2 along rows x 4 along tokens, 32 x 32 results each.
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

    // What this thread rebuilds: 16 columns of a row.
    const u32 my_row = threadIdx.x / 4, my_cols = threadIdx.x % 4 * 16;
    const u32 tile = (first_row + my_row) / TILE_ROWS, row_in_tile = my_row % TILE_ROWS;
    const bool live = first_row + my_row < rows;

    float acc[2][4][4] = {};
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
        // W: planes of rank 1 with the same basis add up their signed coefficients first, v is multiplied once.
        float w[16] = {};
        if (live) {
            const u32 col = depth + my_cols, chunk = col / CHUNK_COLS;
            const u32 sign_at = row_in_tile * chunk_width(units, chunk) * 16 + col % CHUNK_COLS / 8;
            float terms[16] = {};
            for (u32 index = 0; index < n_products; index++) {
                const Product& product = products[index];
                const u32 bits = *(const u16*)(chunk_signs(product, units, tile, chunk) + sign_at);
                const u8* u = (const u8*)product.coefficients + (u64)tile * product.coefficients_stride;
                const bool alone = index + 1 == n_products || products[index + 1].operand != product.operand;
                if (product.rank == 1) {
                    const float coefficient = load_factor(u, product.coefficient_scales, row_in_tile, 0);
#pragma unroll
                    for (u32 c = 0; c < 16; c++) {
                        terms[c] += bits >> c & 1 ? coefficient : -coefficient;
                    }
                    if (alone) {
#pragma unroll
                        for (u32 c = 0; c < 16; c++) {
                            w[c] += terms[c] * load_factor((const void*)product.basis, product.basis_scales, col + c, 0);
                            terms[c] = 0;
                        }
                    }
                } else {
                    float magnitude[16] = {};
                    for (u32 k = 0; k < product.rank; k++) {
                        const float coefficient = load_factor(u, product.coefficient_scales, row_in_tile * product.rank + k, k);
                        const u64 row = (u64)k * units * UNIT_COLS + col;
#pragma unroll
                        for (u32 c = 0; c < 16; c++) {
                            magnitude[c] += coefficient * load_factor((const void*)product.basis, product.basis_scales, row + c, k);
                        }
                    }
#pragma unroll
                    for (u32 c = 0; c < 16; c++) {
                        w[c] += bits >> c & 1 ? magnitude[c] : -magnitude[c];
                    }
                }
            }
        }
#pragma unroll
        for (u32 c = 0; c < 16; c += 2) {
            const u32 low = BFLOAT ? float_to_bfloat(w[c]) : float_to_half(w[c]);
            const u32 high = BFLOAT ? float_to_bfloat(w[c + 1]) : float_to_half(w[c + 1]);
            *(u32*)(w_tile + my_row * BATCH_STRIDE + my_cols + c) = low | high << 16;
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
