// A weight as it lies in device memory. src/layout.rs is the mirror of these structures and writes them.
//
// Signs: rows in tiles of 16, columns in units of 128 and chunks of 4 units; `units` = cols / 128, rounded up. A tile is
// `units * 256` bytes, its chunks one after another; a chunk is 16 rows of 16 bytes a unit. In a row, column c is bit c % 8 of
// byte c / 8, 1 = +1, as on disk. So a warp reads a chunk, 1 KiB, in one piece.
// Bases: rank x units * 128 values. Coefficients: for each tile, 16 x rank values. Rows and columns beyond the weight hold zeros.

constexpr u32 TILE_ROWS = 16;
constexpr u32 UNIT_COLS = 128;
constexpr u32 CHUNK_UNITS = 4;
constexpr u32 CHUNK_COLS = CHUNK_UNITS * UNIT_COLS;
constexpr u32 MAX_PRODUCTS = 64;

// What the values of x, y and W are.
constexpr u32 F32 = 0;
constexpr u32 F16 = 1;  // and 2: bfloat16

// S ⊙ (U V) for one plane and at most 16 ranks of it.
struct Product {
    u64 signs;
    u64 basis;                // f16; i8 where there are scales
    u64 basis_scales;         // f16, one for each rank, or null
    u64 coefficients;         // f16; i8 where there are scales
    u64 coefficient_scales;   // f16, one for each rank, or null
    u32 coefficients_stride;  // bytes from one tile to the next
    u32 rank;
    u32 operand;        // which of the weight's operands Z = V ⊙ x it multiplies
    u32 first;          // 1 for the first product of its operand
    u64 unused;
};

// The spikes of a weight, see spikes.cu.
struct SpikeList {
    u64 words;               // the list, or null: there are none
    u64 basis;               // of block 1, as in its first product
    u64 basis_scales;
    u64 coefficients;        // of block 1, even where later blocks bring others for its plane
    u64 coefficient_scales;
    u32 rank;                // coefficients from one row to the next
    u32 unused;
};

struct Weight {
    u32 rows;
    u32 cols;
    u32 units;
    u32 products;
    Product product[MAX_PRODUCTS];
    SpikeList spikes;
};

static_assert(sizeof(Product) == 64, "src/layout.rs says 64");
static_assert(sizeof(SpikeList) == 48, "src/layout.rs says 48");
static_assert(sizeof(Weight) == 16 + 64 * MAX_PRODUCTS + 48, "src/layout.rs says 16 + 64 a product + 48");

DEVICE float load_value(const void* values, u32 type, u64 index) {
    if (type == F32) {
        return ((const float*)values)[index];
    }
    u16 bits = ((const u16*)values)[index];
    return type == F16 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}

DEVICE void store_value(void* values, u32 type, u64 index, float value) {
    if (type == F32) {
        ((float*)values)[index] = value;
    } else {
        ((u16*)values)[index] = type == F16 ? float_to_half(value) : float_to_bfloat(value);
    }
}

// Value `index` of a factor, in row (or column) k of it.
DEVICE float load_factor(const void* values, u64 scales, u64 index, u32 k) {
    if (scales == 0) {
        return half_to_float(((const u16*)values)[index]);
    }
    return (float)((const signed char*)values)[index] * half_to_float(((const u16*)scales)[k]);
}

// Bytes of a stored value of the coefficients.
DEVICE u32 coefficient_bytes(const Product& product) { return product.coefficient_scales == 0 ? 2 : 1; }

// The first byte of a chunk of a tile, and how many units wide it is.
DEVICE const u8* chunk_signs(const Product& product, u32 units, u32 tile, u32 chunk) {
    return (const u8*)product.signs + (u64)tile * units * 256 + (u64)chunk * 1024;
}
DEVICE u32 chunk_width(u32 units, u32 chunk) {
    u32 left = units - chunk * CHUNK_UNITS;
    return left < CHUNK_UNITS ? left : CHUNK_UNITS;
}
