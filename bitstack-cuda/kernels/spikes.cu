// Spikes: P, a sparse matrix that is added to a weight, P[r, c] = U[r] V[c] Σ value, with the first column of block 1's U and row of its V.
// The list is that of a file, 16-bit words: 15 sizes (f16); for each tile of 64 rows the number of entries up to its end (two words, low one
// first); then the entries, tile after tile, by columns: bits 0 to 5 the row in the tile, 6 to 10 the columns from the entry before, 11
// to 14 the number of the size (0: none, a bridge over columns), 15 the sign. Where an entry's column is, only a sum over those before says.

constexpr u32 SPIKE_ROWS = 64;
constexpr u32 SPIKE_SIZES = 15;

// The entries of a tile.
struct SpikeTile {
    const u16* entries;
    u32 count;
};

DEVICE SpikeTile spike_tile(const Weight& weight, u32 tile) {
    const u16* ends = (const u16*)weight.spikes.words + SPIKE_SIZES;
    const u32 begin = tile == 0 ? 0 : ends[2 * tile - 2] | (u32)ends[2 * tile - 1] << 16;
    const u32 end = ends[2 * tile] | (u32)ends[2 * tile + 1] << 16;
    return {ends + 2 * ((weight.rows + SPIKE_ROWS - 1) / SPIKE_ROWS) + begin, end - begin};
}

// An entry; beyond the last one, a bridge over nothing.
DEVICE u32 spike_entry(const SpikeTile& tile, u64 index) { return index < tile.count ? tile.entries[index] : 0; }

DEVICE u32 spike_gap(u32 entry) { return entry >> 6 & 31; }

DEVICE float spike_value(const Weight& weight, u32 entry) {
    const u32 size = entry >> 11 & 15;
    const float value = size == 0 ? 0.0f : half_to_float(((const u16*)weight.spikes.words)[size - 1]);
    return entry >> 15 ? -value : value;
}

// The size of a unit in a row, without that of the column, and in a column.
DEVICE float spike_row_unit(const Weight& weight, u32 row) {
    const SpikeList& list = weight.spikes;
    return load_factor((const void*)list.coefficients, list.coefficient_scales, (u64)row * list.rank, 0);
}
DEVICE float spike_col_unit(const Weight& weight, u32 col) {
    return load_factor((const void*)weight.spikes.basis, weight.spikes.basis_scales, col, 0);
}

// Lets the lanes that are `live` do their work: at once where places differ, in the order of lanes where they are the same. So a sum of
// several entries at a place is the same every time.
template <typename Work>
DEVICE void in_turn(bool live, u32 place, Work work) {
    const u32 lane = threadIdx.x % 32;
    const u32 turn = (u32)__popc(warp_match(live ? place : ~0u) & ((1u << lane) - 1));
    const u32 turns = warp_max(live ? turn + 1 : 0);
    for (u32 i = 0; i < turns; i++) {
        if (live && turn == i) {
            work();
        }
        __syncwarp();
    }
}

constexpr u32 SPIKE_WARPS = 32;
constexpr u32 SPIKE_TOKENS = 4;

// y[t, r] += U[r] Σ value V[c] x[t, c] over the entries of row r, for each of the weights. Runs after the product that writes y.
// Grid: tiles of 64 rows of the tallest weight x weights x passes of 4 tokens (65535 at most, each block then does several). Block: 32 warps; a
// thread does every 1024th entry of the tile. Nothing happens where the weight's table has no list.
// Shared memory: for each warp 4 x 64 sums (32 KiB), and the columns that each warp's entries cross, twice (256 bytes).
DEVICE void add_spikes(const FusedParameters& p) {
    DYNAMIC_SHARED(shared);
    const FusedWeight& w = p.weight[blockIdx.y];
    const Weight& weight = *(const Weight*)w.weight;
    const u32 rows = weight.rows, cols = weight.cols, first_row = blockIdx.x * SPIKE_ROWS;
    if (weight.spikes.words == 0 || first_row >= rows) {
        return;
    }
    const SpikeTile tile = spike_tile(weight, blockIdx.x);
    if (tile.count == 0) {
        return;
    }
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float* sums = (float*)shared;
    float* own = sums + warp * SPIKE_TOKENS * SPIKE_ROWS;
    u32* crossed = (u32*)(sums + SPIKE_WARPS * SPIKE_TOKENS * SPIKE_ROWS);

    for (u32 pass = blockIdx.z; pass * SPIKE_TOKENS < p.tokens; pass += gridDim.z) {
        const u32 first_token = pass * SPIKE_TOKENS;
        for (u32 i = lane; i < SPIKE_TOKENS * SPIKE_ROWS; i += 32) {
            own[i] = 0;
        }
        __syncwarp();
        u32 col_before = 0, buffer = 0;
        for (u64 at = 0; at < tile.count; at += SPIKE_WARPS * 32) {
            const u32 entry = spike_entry(tile, at + threadIdx.x);
            const u32 ahead = warp_prefix(spike_gap(entry));
            if (lane == 31) {
                crossed[buffer + warp] = ahead;
            }
            // Two buffers: who writes to one again has passed the barrier after which all have read it.
            __syncthreads();
            const u32 of_warp = crossed[buffer + lane];
            const u32 col = col_before + (u32)warp_sum((int)(lane < warp ? of_warp : 0)) + ahead;
            col_before += (u32)warp_sum((int)of_warp);
            buffer ^= SPIKE_WARPS;
            if (at + warp * 32 >= tile.count) {
                continue;
            }
            const float value = spike_value(weight, entry);
            const bool live = value != 0.0f && col < cols;
            float term[SPIKE_TOKENS] = {};
            if (live) {
                const float unit = value * spike_col_unit(weight, col);
#pragma unroll
                for (u32 t = 0; t < SPIKE_TOKENS; t++) {
                    if (first_token + t < p.tokens) {
                        term[t] = unit * load_value((const void*)p.x, p.x_type, (u64)(first_token + t) * cols + col);
                    }
                }
            }
            const u32 row = entry % SPIKE_ROWS;
            in_turn(live, row, [&]() {
#pragma unroll
                for (u32 t = 0; t < SPIKE_TOKENS; t++) {
                    own[t * SPIKE_ROWS + row] += term[t];
                }
            });
        }
        __syncthreads();
        const u32 row = first_row + threadIdx.x % SPIKE_ROWS, token = first_token + threadIdx.x / SPIKE_ROWS;
        if (threadIdx.x < SPIKE_TOKENS * SPIKE_ROWS && row < rows && token < p.tokens) {
            float sum = 0;
            for (u32 from = 0; from < SPIKE_WARPS; from++) {
                sum += sums[from * SPIKE_TOKENS * SPIKE_ROWS + threadIdx.x];
            }
            const u64 at = (u64)token * rows + row;
            const float y = load_value((const void*)w.y, p.y_type, at);
            store_value((void*)w.y, p.y_type, at, y + spike_row_unit(weight, row) * sum);
        }
        __syncthreads();  // the next pass begins with the sums
    }
}

KERNEL(1024, 1) spikes(PARAMETERS FusedParameters p) { add_spikes(p); }
