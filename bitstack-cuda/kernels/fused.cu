// y = W x for a few tokens, straight from the bits: W is never rebuilt.
//
// For each product (a plane of a weight, up to 16 ranks), with z = V[k] ⊙ x:   y[r] += U[r, k] (2 Σ_c bit[r, c] z[c] - Σ_c z[c]).
// The sums over columns are integer products on tensor cores, 16 rows x 32 columns at a time:
//  - A is the bits themselves: a 32-bit word of a row, masked with 0x01010101 << b, is four bytes of value 0 or 2^b, one instruction
//    for four weights. The columns that meet in one mma are those of one bit position; Z is laid out to suit ("fragment order").
//  - B is z in 16 bits, as two columns hi and lo of 8: z ~ s (256 hi + lo), with one scale s for 512 columns ("chunk"). Odd bit positions
//    carry z / 2, so that bits 0 and 1 share an accumulator, and bits 2 and 3 another, of weight 4.
//  - 2 T - Σ is taken in integers; only then scales and coefficients are applied, in f32.
// A column of Z is one pair of token and rank: m = token * padded rank + k, as columns 2m (hi) and 2m + 1 (lo) of B.

// Z of one chunk is a record for each column of B: for each half p of a 128-column unit, bit j and unit t, 2 x 4 bytes; then, in the
// columns of hi, the scale, Σ hi and Σ lo. 544 bytes: so a quarter warp reads 32 bytes of 8 columns from all banks, at addresses known at
// compile time but for the record's own.
constexpr u32 RECORD_BYTES = 544;
constexpr u32 RECORD_META = 512;

// Prepares pairs `first`, `first + step`, .. of a chunk; one warp. Lane 8t + j does columns 8i + j of unit t. A pair m is token
// m >> rank_shift and rank m & (2^rank_shift - 1).
DEVICE void prepare_chunk(const Product& product, u32 units, u32 cols, u32 chunk, const void* x, u32 x_type, u32 first_token,
                          u32 tokens, u32 rank_shift, u32 columns, u32 first, u32 step, u8* records) {
    const u32 lane = threadIdx.x % 32, t = lane / 8, j = lane % 8;
    const u32 first_col = chunk * CHUNK_COLS + t * UNIT_COLS + j;
    for (u32 m = first; m < columns / 2; m += step) {
        const u32 token = first_token + (m >> rank_shift), k = m & ((1u << rank_shift) - 1);
        const bool live = token < tokens && k < product.rank;
        float z[16];
        u32 top = 0;
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            const u32 col = first_col + 8 * i;
            z[i] = 0;
            if (live && col < cols) {
                const float v = load_factor((const void*)product.basis, product.basis_scales, (u64)k * units * UNIT_COLS + col, k);
                z[i] = v * load_value(x, x_type, (u64)token * cols + col);
            }
            // The bits of numbers that are not negative are in the order of the numbers; infinities and NaNs come last.
            const u32 bits = __float_as_uint(z[i]) & 0x7fffffffu;
            top = bits > top ? bits : top;
        }
        top = warp_max(top);
        float largest = __uint_as_float(top);
        float scale = largest / 32512.0f;
        if (top >= 0x7f800000u) {
            // Not finite: neither is the result. The integers stay zero.
            scale = __uint_as_float(0x7fc00000u);
            largest = 0;
        }
        // Below, the reciprocal would overflow; next to any other chunk it is nothing.
        const float inverse = largest > 1e-30f ? 32512.0f / largest : 0.0f;
        const float step_inverse = j % 2 == 1 ? 0.5f * inverse : inverse;
        int sum_hi = 0, sum_lo = 0;
#pragma unroll
        for (u32 word = 0; word < 4; word++) {
            u32 hi_word = 0, lo_word = 0;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const float value = z[4 * word + i];
                const int code = inverse > 0.0f ? __float2int_rn(value * step_inverse) : 0;
                const int hi = (code + 128) >> 8, lo = code - 256 * hi;
                hi_word |= (u32)(hi & 255) << (8 * i);
                lo_word |= (u32)(lo & 255) << (8 * i);
                sum_hi += hi;
                sum_lo += lo;
            }
            u8* to = records + 2 * m * RECORD_BYTES + (word / 2 * 8 + j) * 32 + t * 8 + word % 2 * 4;
            *(u32*)to = hi_word;
            *(u32*)(to + RECORD_BYTES) = lo_word;
        }
        sum_hi = warp_sum(j % 2 == 1 ? 2 * sum_hi : sum_hi);
        sum_lo = warp_sum(j % 2 == 1 ? 2 * sum_lo : sum_lo);
        if (lane == 0) {
            uint4 meta = {__float_as_uint(scale), (u32)sum_hi, (u32)sum_lo, 0};
            *(uint4*)(records + 2 * m * RECORD_BYTES + RECORD_META) = meta;
        }
    }
}

constexpr u32 MAX_WEIGHTS = 4;

struct FusedWeight {
    u64 weight;
    u64 y;
    u64 operands;  // its prepared operands, where they lie in global memory
    u64 unused;
};

struct FusedParameters {
    u64 x;
    u32 x_type;
    u32 y_type;
    u32 tokens;
    u32 weights;
    u32 rank_shift;       // the rank, padded to 1, 2, 4, 8 or 16, is two to this
    u32 pass_tokens;      // tokens of one pass (blockIdx.y)
    u32 columns;          // columns of B: 2 * padded rank * pass_tokens
    u32 column_shift;     // the warps that share the columns of a tile, 1, 2, 4 or 8, are two to this
    u32 chunks;           // of a row
    u32 passes;
    u32 capacity;         // products for which there is room at `operands`
    u32 unused;
    FusedWeight weight[MAX_WEIGHTS];
};
static_assert(sizeof(FusedParameters) == 56 + 32 * MAX_WEIGHTS, "src/plan.rs says so");

DEVICE u8* operand_records(const FusedParameters& p, const FusedWeight& w, u32 operand, u32 pass, u32 chunk) {
    return (u8*)w.operands + (((u64)operand * p.passes + pass) * p.chunks + chunk) * p.columns * RECORD_BYTES;
}

// Z of every operand, in global memory.
// Grid: chunks x (weights * capacity) x passes. Block: 128 threads, each warp every fourth pair. No shared memory.
KERNEL(128, 1) prepare(PARAMETERS FusedParameters p) {
    const FusedWeight& w = p.weight[blockIdx.y / p.capacity];
    const Weight& weight = *(const Weight*)w.weight;
    const u32 index = blockIdx.y % p.capacity, chunk = blockIdx.x, pass = blockIdx.z;
    if (index >= weight.products || weight.product[index].first == 0) {
        return;
    }
    const Product& product = weight.product[index];
    prepare_chunk(product, weight.units, weight.cols, chunk, (const void*)p.x, p.x_type, pass * p.pass_tokens, p.tokens,
                  p.rank_shift, p.columns, threadIdx.x / 32, 4, operand_records(p, w, product.operand, pass, chunk));
}

constexpr u32 WARPS = 8;
constexpr u32 STAGES = 4;     // chunks of signs under way for each warp
constexpr u32 STAGE_ROW = 17; // floats of a row of partial results, one more than a tile has

// Where a warp is: row tiles in items of 8 / column_warps tiles, products, chunks; the signs are read in this order.
struct Cursor {
    u32 item, product, chunk;
};

DEVICE uint2 load_operand(const uint2* from, [[maybe_unused]] bool prepared) {
#ifdef BITSTACK_SHIM
    return *from;
#else
    return prepared ? __ldg(from) : *from;
#endif
}

// Grid: as many blocks as run at once x passes. Block: 8 warps. Row tiles are dealt out in equal shares of the bytes to read; the number of
// planes is read from the weights' tables, so a captured launch stays right when planes come and go.
// Shared memory: the products' table (4 KiB), partial results (2 x 8 x columns / 2 x 68 bytes), signs and coefficients under way
// (8 x STAGES x (1024 + 32 x padded rank)), and, when Z is not prepared, its records (chunks x columns x 544).
template <int TILES, bool PREPARED>
DEVICE void fused(const FusedParameters& p) {
    DYNAMIC_SHARED(shared);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 column_warps = 1u << p.column_shift, row_shift = 3 - p.column_shift, row_warps = 1u << row_shift;
    const u32 warp_row = warp >> p.column_shift, warp_col = warp & (column_warps - 1);
    const u32 pairs = p.columns / 2, pass = blockIdx.y, chunk_record_bytes = p.columns * RECORD_BYTES;
    const u32 padded_rank = 1u << p.rank_shift, slot_bytes = 1024 + 32 * padded_rank;

    Product* products = (Product*)shared;
    float* partial = (float*)(shared + sizeof(Product) * MAX_PRODUCTS);
    u8* rings = (u8*)(partial + 2 * WARPS * pairs * STAGE_ROW);
    u8* ring = rings + warp * STAGES * slot_bytes;
    u8* own_records = rings + WARPS * STAGES * slot_bytes;

    // Where this lane reads of a chunk's records. Past the last column it reads that again: a column of the result depends on that column of
    // B only, and nobody looks at those.
    u32 column_at[TILES];
#pragma unroll
    for (u32 n = 0; n < TILES; n++) {
        const u32 column = n * 8 + g;
        column_at[n] = (column < p.columns ? column : p.columns - 1) * RECORD_BYTES + t * 8;
    }

    u64 total = 0;
    for (u32 i = 0; i < p.weights; i++) {
        const Weight& weight = *(const Weight*)p.weight[i].weight;
        const u32 tiles = (weight.rows + TILE_ROWS - 1) / TILE_ROWS;
        total += (u64)((tiles + row_warps - 1) / row_warps) * (weight.products > 0 ? weight.products : 1);
    }
    const u64 share_begin = total * blockIdx.x / gridDim.x, share_end = total * (blockIdx.x + 1) / gridDim.x;

    u64 before = 0;
    u32 parity = 0;
    for (u32 i = 0; i < p.weights; i++) {
        const FusedWeight& w = p.weight[i];
        const Weight& weight = *(const Weight*)w.weight;
        const u32 rows = weight.rows, cols = weight.cols, units = weight.units, n_products = weight.products;
        const u32 tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, items = (tiles + row_warps - 1) / row_warps;
        const u32 cost = n_products > 0 ? n_products : 1;
        // The items that begin inside this block's share.
        const u64 from = share_begin > before ? (share_begin - before + cost - 1) / cost : 0;
        const u64 to = share_end > before ? (share_end - before + cost - 1) / cost : 0;
        const u32 first_item = from < items ? (u32)from : items, last_item = to < items ? (u32)to : items;
        before += (u64)items * cost;
        if (first_item >= last_item) {
            continue;
        }

        __syncthreads();  // nobody reads the last weight's table and operand any more
        for (u32 at = threadIdx.x; at < n_products * (u32)(sizeof(Product) / 16); at += blockDim.x) {
            ((uint4*)products)[at] = ((const uint4*)weight.product)[at];
        }
        if (!PREPARED && n_products > 0) {
            for (u32 chunk = warp; chunk < p.chunks; chunk += WARPS) {
                prepare_chunk(weight.product[0], units, cols, chunk, (const void*)p.x, p.x_type, pass * p.pass_tokens, p.tokens,
                              p.rank_shift, p.columns, 0, 1, own_records + chunk * chunk_record_bytes);
            }
        }
        __syncthreads();

        Cursor ahead = {n_products > 0 ? first_item : last_item, 0, warp_col};
        if (first_item * row_warps + warp_row >= tiles) {
            ahead.item = last_item;
        }
        u32 issued = 0;
        // Starts the copies of the chunk `ahead` points to, with the coefficients when it is the row's last; always one group.
        auto issue = [&]() {
            if (ahead.item < last_item) {
                const Product& product = products[ahead.product];
                const u32 tile = ahead.item * row_warps + warp_row;
                u8* slot = ring + issued % STAGES * slot_bytes;
                const u8* signs = chunk_signs(product, units, tile, ahead.chunk);
                const u32 width = chunk_width(units, ahead.chunk);
                if (t < width) {
                    copy_async(slot + lane * 16, signs + (g * width + t) * 16);
                    copy_async(slot + 512 + lane * 16, signs + ((g + 8) * width + t) * 16);
                }
                ahead.chunk += column_warps;
                if (ahead.chunk >= p.chunks) {
                    if (lane < product.rank * coefficient_bytes(product)) {
                        const u8* u = (const u8*)product.coefficients + (u64)tile * product.coefficients_stride;
                        copy_async(slot + 1024 + lane * 16, u + lane * 16);
                    }
                    ahead.chunk = warp_col;
                    ahead.product++;
                    if (ahead.product == n_products) {
                        ahead.product = 0;
                        ahead.item++;
                        if (ahead.item * row_warps + warp_row >= tiles) {
                            ahead.item = last_item;
                        }
                    }
                }
            }
            copy_commit();
            issued++;
        };
        for (u32 s = 0; s + 1 < STAGES; s++) {
            issue();
        }

        u32 step = 0;
        for (u32 item = first_item; item < last_item; item++) {
            float y[TILES][2] = {};
            const u32 tile = item * row_warps + warp_row;
            for (u32 index = 0; index < n_products && tile < tiles; index++) {
                const Product& product = products[index];
                float sums[TILES][2] = {};
                for (u32 chunk = warp_col; chunk < p.chunks; chunk += column_warps) {
                    copy_wait<STAGES - 2>();
                    __syncwarp();  // the lanes see each other's copies, and none still reads the slot that is filled next
                    issue();
                    const u8* slot = ring + step % STAGES * slot_bytes;
                    step++;
                    const u8* records = PREPARED ? operand_records(p, w, product.operand, pass, chunk)
                                                 : own_records + chunk * chunk_record_bytes;
                    const uint4 upper = *(const uint4*)(slot + lane * 16), lower = *(const uint4*)(slot + 512 + lane * 16);
                    const u8* from[TILES];
#pragma unroll
                    for (u32 n = 0; n < TILES; n++) {
                        from[n] = records + column_at[n];
                    }
                    int acc[2][TILES][4] = {};
                    // Unrolled whole, four tiles of B would not fit in the registers.
#pragma unroll(TILES < 4 ? 2 : 1)
                    for (u32 half = 0; half < 2; half++) {
                        u32 a0 = half == 0 ? upper.x : upper.z, a2 = half == 0 ? upper.y : upper.w;
                        u32 a1 = half == 0 ? lower.x : lower.z, a3 = half == 0 ? lower.y : lower.w;
#pragma unroll
                        for (u32 bit = 0; bit < 8; bit++) {
                            const u32 mask = 0x01010101u << bit % 4;
#pragma unroll
                            for (u32 n = 0; n < TILES; n++) {
                                const uint2 b = load_operand((const uint2*)(from[n] + bit * 32), PREPARED);
                                mma_u8_s8(acc[bit % 4 / 2][n], a0 & mask, a1 & mask, a2 & mask, a3 & mask, b);
                            }
                            if (bit == 3) {
                                a0 >>= 4, a1 >>= 4, a2 >>= 4, a3 >>= 4;
                            }
                        }
#pragma unroll
                        for (u32 n = 0; n < TILES; n++) {
                            from[n] += 8 * 32;
                        }
                    }
#pragma unroll
                    for (u32 n = 0; n < TILES; n++) {
                        const u32 m = n * 4 + t;
                        if (m < pairs) {
                            const uint4 meta = *(const uint4*)(records + 2 * m * RECORD_BYTES + RECORD_META);
#pragma unroll
                            for (u32 h = 0; h < 2; h++) {
                                const int hi = 2 * (acc[0][n][2 * h] + (acc[1][n][2 * h] >> 2)) - (int)meta.y;
                                const int lo = 2 * (acc[0][n][2 * h + 1] + (acc[1][n][2 * h + 1] >> 2)) - (int)meta.z;
                                sums[n][h] += __uint_as_float(meta.x) * (256.0f * (float)hi + (float)lo);
                            }
                        }
                    }
                    if (chunk + column_warps >= p.chunks) {
#pragma unroll
                        for (u32 n = 0; n < TILES; n++) {
                            const u32 k = (n * 4 + t) & (padded_rank - 1);
                            if (k < product.rank) {
#pragma unroll
                                for (u32 h = 0; h < 2; h++) {
                                    const u32 at = (g + 8 * h) * product.rank + k;
                                    y[n][h] += load_factor(slot + 1024, product.coefficient_scales, at, k) * sums[n][h];
                                }
                            }
                        }
                    }
                }
            }

            // Sums over the warps that share a tile and over rank, in a fixed order. Two buffers, so that one barrier an item is enough.
            float* mine = partial + (parity * WARPS + warp) * pairs * STAGE_ROW;
#pragma unroll
            for (u32 n = 0; n < TILES; n++) {
                const u32 m = n * 4 + t;
                if (m < pairs) {
                    mine[m * STAGE_ROW + g] = y[n][0];
                    mine[m * STAGE_ROW + g + 8] = y[n][1];
                }
            }
            __syncthreads();
            for (u32 at = threadIdx.x; at < row_warps * p.pass_tokens * TILE_ROWS; at += blockDim.x) {
                const u32 r = at % TILE_ROWS, of = at / TILE_ROWS & (row_warps - 1), token = at / TILE_ROWS >> row_shift;
                const u32 row = (item * row_warps + of) * TILE_ROWS + r, to_token = pass * p.pass_tokens + token;
                if (row < rows && to_token < p.tokens) {
                    float sum = 0;
                    for (u32 c = 0; c < column_warps; c++) {
                        const float* from_warp = partial + (parity * WARPS + (of << p.column_shift) + c) * pairs * STAGE_ROW;
                        for (u32 k = 0; k < padded_rank; k++) {
                            sum += from_warp[(token * padded_rank + k) * STAGE_ROW + r];
                        }
                    }
                    store_value((void*)w.y, p.y_type, (u64)to_token * rows + row, sum);
                }
            }
            parity ^= 1;
        }
        copy_wait<0>();
    }
}

KERNEL(256, 2) fused_own(PARAMETERS FusedParameters p) { fused<1, false>(p); }
KERNEL(256, 2) fused_prepared_1(PARAMETERS FusedParameters p) { fused<1, true>(p); }
KERNEL(256, 2) fused_prepared_2(PARAMETERS FusedParameters p) { fused<2, true>(p); }
KERNEL(256, 2) fused_prepared_4(PARAMETERS FusedParameters p) { fused<4, true>(p); }
