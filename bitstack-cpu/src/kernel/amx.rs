//! AMX: sixteen rows of signs times sixteen vectors in a tile product of bytes.
//!
//! The lanes are the rows of W: after the transposition that the tables use, dword n of a register holds four bytes of row n's signs, and
//! `vgf2p8affineqb` turns bit j of each into the byte +1 or -1. Sixteen such registers are a tile of 16 rows x 64 columns, {8i + j} for
//! i = 0..64, as `tdpbssd` takes its second operand. Its first is a tile of up to sixteen vectors x 64 columns: codes of z in 16 bits, high and
//! low bytes (256 · high + low, both signed) in tiles of their own. So the sums are `vectors x rows`, as the coefficients and y are.
//!
//! A unit is 32 rows x 512 columns, eight tiles for each 16 rows. What it needs, 16 KiB of signs as bytes and 16 KiB of codes, stays in the
//! first-level cache. A vector has a scale for every 512 columns.
//!
//! [`Tiles`] multiplies with the instructions or, a number at a time, without: the same loops run on every CPU. What is in the tile registers
//! lives within one block of assembly. How they are configured lives as long as [`Configured`], which stays on its thread; nothing
//! else in it uses tiles.

#[cfg(target_arch = "x86_64")]
use std::arch::{asm, x86_64::*};
use std::marker::PhantomData;

#[cfg(target_arch = "x86_64")]
use super::avx512;
use super::tables::{Ahead, LINE_COLS, LINE_ROWS, Part, Vector};
use crate::Isa;

/// Columns of a pass.
pub(crate) const PASS_COLS: usize = 512;

/// Lines of signs of a pass.
pub(crate) const PASS_LINES: usize = PASS_COLS / LINE_COLS;

/// Rows of a unit.
const UNIT_ROWS: usize = 2 * LINE_ROWS;

/// The signs of sixteen rows in a pass: in line q bytes 4q..4q + 4 of each row.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Lines([[u8; 64]; PASS_LINES]);

/// The most vectors in a tile.
pub(crate) const VECTORS: usize = 16;

/// Tiles of a unit for each 16 rows, one for each bit of a byte.
const PHASES: usize = 8;

/// The largest code, 127 · 256 + 127.
const LARGEST: f32 = 32639.0;

/// The smallest maximum whose inverse is safely finite.
const SMALLEST_MAX: f32 = 1e-30;

/// Sixteen rows of 64 bytes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[i8; 64]; 16]);

/// Sixteen rows of sixteen sums.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Sums([[i32; 16]; 16]);

/// The codes of 512 columns of up to sixteen vectors: for each phase j a tile `vectors x 64` whose byte i is that of column 8i + j.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Codes {
    high: [Tile; PHASES],
    low: [Tile; PHASES],
}

impl Default for Codes {
    fn default() -> Self {
        let zero = [Tile([[0; 64]; 16]); PHASES];
        Self { high: zero, low: zero }
    }
}

/// The signs of a unit: for each 16 rows and each phase j a tile whose row q has, at 4n + b, that of row n and column 8(4q + b) + j.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Unit([[Tile; PHASES]; 2]);

/// The sums of a unit: of high codes and of low ones, for each 16 rows, `vectors x rows`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Products([[Sums; 2]; 2]);

/// What multiplies tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tiles {
    /// The instructions.
    #[cfg(target_arch = "x86_64")]
    Amx(Proof),
    /// Loops that say what the instructions do.
    Plain,
}

/// That this process may use AMX, and AVX-512 with VNNI, GFNI and VBMI.
#[cfg(target_arch = "x86_64")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Proof(());

impl Tiles {
    /// The instructions, if `isa` has them and this CPU has `isa`.
    pub(crate) fn of(isa: Isa) -> Option<Self> {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx if isa.is_available() => Some(Self::Amx(Proof(()))),
            _ => None,
        }
    }

    /// What else may be used.
    pub(crate) fn isa(self) -> Isa {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => Isa::Amx,
            Self::Plain => Isa::Scalar,
        }
    }

    /// Makes the codes of 512 columns of vector `vector`, and returns the value of one step. `None` when they cannot represent it: a value
    /// is not finite, or all are tiny and not zero.
    pub(crate) fn encode(self, z: &[f32; PASS_COLS], codes: &mut Codes, vector: usize) -> Option<f32> {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the only obligation is the target features, of which there is proof.
            Self::Amx(Proof(())) => unsafe { encode_avx512(z, codes, vector) },
            Self::Plain => encode(z, codes, vector),
        }
    }

    /// Sets the tile registers of this thread up for groups of up to `vectors` vectors. One at a time on a thread: the last one dropped
    /// leaves the registers to others.
    pub(crate) fn configure(self, vectors: usize) -> Configured {
        assert!((1..=VECTORS).contains(&vectors));
        #[cfg(target_arch = "x86_64")]
        if self != Self::Plain {
            // SAFETY: the instructions may be used, of which there is proof.
            unsafe { configure_amx(vectors as u8) }
        }
        let zero = Sums([[0; 16]; 16]);
        Configured {
            tiles: self,
            vectors,
            unit: Unit([[Tile([[0; 64]; 16]); PHASES]; 2]),
            products: Products([[zero; 2]; 2]),
            thread: PhantomData,
        }
    }
}

/// Tile registers ready for products, and the memory around them.
pub(crate) struct Configured {
    tiles: Tiles,
    vectors: usize,
    unit: Unit,
    products: Products,
    /// Not to be sent to another thread.
    thread: PhantomData<*const ()>,
}

impl Configured {
    /// One pass over a plane: `y[v][r] += u[v][r] · scale[v] · Σ ± z[v]` over the rows and columns of `part`, for all of `n_vectors` vectors, in
    /// groups whose codes are `codes`. As many bytes from `ahead` are brought into the second-level cache.
    pub(crate) fn pass<'u>(
        &mut self,
        part: &Part<'_>,
        codes: &[Codes],
        n_vectors: usize,
        vector: impl Fn(usize) -> Vector<'u>,
        y: &mut [f32],
        ahead: Ahead,
    ) {
        assert!(part.rows.start.is_multiple_of(LINE_ROWS) && part.rows.end <= part.signs.rows());
        assert!(part.lines.len() <= PASS_LINES && codes.len() == n_vectors.div_ceil(self.vectors));
        let mut lines = Lines([[0; 64]; PASS_LINES]);
        for first_row in (0..part.rows.len()).step_by(UNIT_ROWS) {
            let rows = UNIT_ROWS.min(part.rows.len() - first_row);
            // Sixteen rows that are not there at all keep what they had.
            for half in 0..rows.div_ceil(LINE_ROWS) {
                let strip = first_row / LINE_ROWS + half;
                part.signs.copy_lines(part.rows.start / LINE_ROWS + strip, part.lines.start, &mut lines.0);
                self.unpack(half, &lines, ahead.strip(strip), ahead.line_bytes);
            }
            for (codes, first) in codes.iter().zip((0..n_vectors).step_by(self.vectors)) {
                self.multiply(codes);
                for i in 0..self.vectors.min(n_vectors - first) {
                    let Vector { scale, u, y: at } = vector(first + i);
                    self.add(i, scale, &u[first_row..][..rows], &mut y[at + first_row..][..rows]);
                }
            }
        }
    }

    /// The signs of one half of a unit, as bytes. From `at` on one byte every `step` is prefetched.
    fn unpack(&mut self, half: usize, lines: &Lines, at: *const u8, step: usize) {
        let tiles = &mut self.unit.0[half];
        match self.tiles {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the only obligation is the target features, of which there is proof.
            Tiles::Amx(Proof(())) => unsafe { unpack_avx512(lines, at, step, tiles) },
            Tiles::Plain => {
                let _ = (at, step); // for the prefetching instruction only
                unpack(lines, tiles);
            }
        }
    }

    fn multiply(&mut self, codes: &Codes) {
        match self.tiles {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the instructions may be used, of which there is proof, and `configure` has set up the tiles of this thread, which `self` does
            // not leave; they are given up only when it is dropped.
            Tiles::Amx(Proof(())) => unsafe { multiply_amx(codes, &self.unit, &mut self.products) },
            Tiles::Plain => multiply(codes, &self.unit, self.vectors, &mut self.products),
        }
    }

    /// `y += u · scale · sums` of vector `i`.
    fn add(&self, i: usize, scale: f32, u: &[f32], y: &mut [f32]) {
        match self.tiles {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the only obligation is the target features, of which there is proof.
            Tiles::Amx(Proof(())) => unsafe { add_avx512(&self.products, i, scale, u, y) },
            Tiles::Plain => add(&self.products, i, scale, u, y),
        }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for Configured {
    fn drop(&mut self) {
        if self.tiles != Tiles::Plain {
            // SAFETY: the instructions may be used, of which there is proof.
            unsafe { release_amx() }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi")]
fn encode_avx512(z: &[f32; PASS_COLS], codes: &mut Codes, vector: usize) -> Option<f32> {
    // Byte 8j + i comes from byte 8i + j.
    let from: [u8; 64] = std::array::from_fn(|at| (at % 8 * 8 + at / 8) as u8);
    // SAFETY: the pointer must be valid for reading 64 bytes, at any alignment; it comes from a reference to them.
    let from = unsafe { _mm512_loadu_si512(from.as_ptr().cast()) };
    encode_with(z, codes, vector, |bytes| {
        // SAFETY: as above.
        let transposed = _mm512_permutexvar_epi8(from, unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) });
        // SAFETY: the pointer must be valid for writing 64 bytes, at any alignment; it comes from an exclusive reference to them.
        unsafe { _mm512_storeu_si512(bytes.as_mut_ptr().cast(), transposed) }
    })
}

fn encode(z: &[f32; PASS_COLS], codes: &mut Codes, vector: usize) -> Option<f32> {
    encode_with(z, codes, vector, |bytes| {
        let before = *bytes;
        *bytes = std::array::from_fn(|at| before[at % 8 * 8 + at / 8]);
    })
}

/// [`Tiles::encode`] with what transposes 8 x 8 bytes.
#[inline(always)]
fn encode_with(
    z: &[f32; PASS_COLS],
    codes: &mut Codes,
    vector: usize,
    transpose: impl Fn(&mut [i8; 64]),
) -> Option<f32> {
    let mut largest = [0.0f32; 16];
    let mut finite = true;
    for z in z.as_chunks::<16>().0 {
        for (largest, &z) in largest.iter_mut().zip(z) {
            finite &= z.is_finite();
            *largest = largest.max(z.abs());
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    if !finite || (largest > 0.0 && largest < SMALLEST_MAX) {
        return None;
    }
    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
    for (block, z) in z.as_chunks::<64>().0.iter().enumerate() {
        let (mut high, mut low) = ([0; 64], [0; 64]);
        for c in 0..64 {
            // Rounded to the nearest integer by adding 1.5 · 2^23, whose last bit is worth 1.
            let code = (z[c] * inverse + 12_582_912.0).to_bits() as i32 - 0x4b40_0000;
            (high[c], low[c]) = (((code + 128) >> 8) as i8, code as i8);
        }
        transpose(&mut high);
        transpose(&mut low);
        for j in 0..PHASES {
            codes.high[j].0[vector].as_chunks_mut::<8>().0[block] = high.as_chunks().0[j];
            codes.low[j].0[vector].as_chunks_mut::<8>().0[block] = low.as_chunks().0[j];
        }
    }
    Some(largest / LARGEST)
}

fn unpack(lines: &Lines, tiles: &mut [Tile; PHASES]) {
    for (q, line) in lines.0.iter().enumerate() {
        for (i, byte) in line.iter().enumerate() {
            for (j, tile) in tiles.iter_mut().enumerate() {
                tile.0[q][i] = if byte >> j & 1 == 1 { 1 } else { -1 };
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,gfni")]
fn unpack_avx512(lines: &Lines, at: *const u8, step: usize, tiles: &mut [Tile; PHASES]) {
    for (j, tile) in tiles.iter_mut().enumerate() {
        // Bit 0 is set, and bits 1 to 7 are bit j inverted: 1 or -1.
        let matrix = _mm512_set1_epi64(0x0001_0101_0101_0101 << j);
        for (row, line) in tile.0.iter_mut().zip(&lines.0) {
            let bytes = _mm512_gf2p8affine_epi64_epi8::<0xff>(avx512::load_bytes(line), matrix);
            // SAFETY: the pointer must be valid for writing 64 bytes, at any alignment; it comes from an exclusive reference to them.
            unsafe { _mm512_storeu_si512(row.as_mut_ptr().cast(), bytes) }
        }
        for line in 0..2 {
            avx512::prefetch(at.wrapping_add(step * (2 * j + line)));
        }
    }
}

/// What [`multiply_amx`] computes.
fn multiply(codes: &Codes, unit: &Unit, vectors: usize, products: &mut Products) {
    for (codes, products) in [&codes.high, &codes.low].into_iter().zip(&mut products.0) {
        for (signs, sums) in unit.0.iter().zip(products) {
            for (v, sums) in sums.0.iter_mut().enumerate().take(vectors) {
                *sums = [0; 16];
                for (codes, signs) in codes.iter().zip(signs) {
                    for (fours, signs) in codes.0[v].as_chunks::<4>().0.iter().zip(&signs.0) {
                        for (sum, signs) in sums.iter_mut().zip(signs.as_chunks::<4>().0) {
                            *sum += (0..4).map(|b| i32::from(fours[b]) * i32::from(signs[b])).sum::<i32>();
                        }
                    }
                }
            }
        }
    }
}

/// Configures tiles 0 to 3 (sums) and 4 and 5 (codes) with `vectors` rows, 6 and 7 (signs) with sixteen, all of 64 bytes.
///
/// # Safety
/// The CPU must have AMX, and the process be allowed to use it. `vectors` must be 1 to 16.
#[cfg(target_arch = "x86_64")]
unsafe fn configure_amx(vectors: u8) {
    /// As the instruction reads it.
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let mut rows = [0; 16];
    rows[..6].fill(vectors);
    rows[6..8].fill(16);
    let mut row_bytes = [0; 16];
    row_bytes[..8].fill(64);
    let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
    // SAFETY: the caller vouches for the instruction. It reads 64 bytes, the size of `configuration`, whose values are within the limits of
    // palette 1, and writes the tile registers, declared as written.
    unsafe {
        asm!(
            "ldtilecfg [{at}]",
            at = in(reg) &raw const configuration,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(readonly, nostack, preserves_flags),
        );
    }
}

/// Gives up what [`configure_amx`] has set up.
///
/// # Safety
/// The CPU must have AMX, and the process be allowed to use it.
#[cfg(target_arch = "x86_64")]
unsafe fn release_amx() {
    // SAFETY: the caller vouches for the instruction. It writes the tile registers, declared as written, and touches no memory.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nomem, nostack, preserves_flags),
        );
    }
}

/// The products of all tiles of codes and signs: high and low, of each 16 rows.
///
/// # Safety
/// The CPU must have AMX, the process be allowed to use it, and the tiles be as [`configure_amx`] has set them up on this thread.
#[cfg(target_arch = "x86_64")]
unsafe fn multiply_amx(codes: &Codes, unit: &Unit, products: &mut Products) {
    // SAFETY:
    // - the caller vouches for the instructions and the configuration;
    // - tiles are read at 64-byte strides, sixteen rows at most, 8192 bytes apart and eight times 1024 bytes on: the two halves of `Codes`
    //   and of `Unit`, both `repr(C)`, 2 x 8 tiles of 1024 bytes, which the references make valid for reading;
    // - sums are written at 64-byte strides, sixteen rows at most, to the 4 x 1024 bytes of `Products`, an exclusive reference;
    // - all tile registers are declared as written, no other register is.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{codes} + {stride}]",
            "tileloadd tmm6, [{signs} + {stride}]",
            "tdpbssd tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{signs} + {stride} + 8192]",
            "tdpbssd tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{codes} + {stride} + 8192]",
            "tdpbssd tmm2, tmm5, tmm6",
            "tdpbssd tmm3, tmm5, tmm7",
            "add {codes}, 1024",
            "add {signs}, 1024",
            "dec {phases}",
            "jnz 2b",
            "tilestored [{sums} + {stride}], tmm0",
            "tilestored [{sums} + {stride} + 1024], tmm1",
            "tilestored [{sums} + {stride} + 2048], tmm2",
            "tilestored [{sums} + {stride} + 3072], tmm3",
            codes = inout(reg) &raw const *codes => _,
            signs = inout(reg) &raw const *unit => _,
            sums = in(reg) &raw mut *products,
            stride = in(reg) 64usize,
            phases = inout(reg) PHASES => _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn add_avx512(products: &Products, i: usize, scale: f32, u: &[f32], y: &mut [f32]) {
    add(products, i, scale, u, y);
}

#[inline(always)]
fn add(products: &Products, i: usize, scale: f32, u: &[f32], y: &mut [f32]) {
    let [high, low] = &products.0;
    // At most 512 · 32639 steps: within 2^24.
    let sums = |half: usize, r: usize| ((high[half].0[i][r] << 8) + low[half].0[i][r]) as f32 * scale;
    let (whole_u, last_u) = u.as_chunks::<16>();
    let (whole_y, last_y) = y.as_chunks_mut::<16>();
    for (half, (u, y)) in whole_u.iter().zip(whole_y).enumerate() {
        for r in 0..16 {
            y[r] += u[r] * sums(half, r);
        }
    }
    for (r, (u, y)) in last_u.iter().zip(last_y).enumerate() {
        *y += u * sums(whole_u.len(), r);
    }
}

/// Whether this process may use AMX: the CPU has it, the system keeps its registers and permits their use, and a product by the instructions
/// has come out as it should. Needs AVX-512 with GFNI. To be asked once.
#[cfg(target_arch = "x86_64")]
pub(crate) fn is_usable() -> bool {
    // SAFETY: the CPU must have AVX-512 with GFNI, as the caller says, and AMX, and the process be allowed to use it, as the calls before say.
    cpu_has_amx() && system_permits_amx() && unsafe { self_check() }
}

/// AMX with bytes, palette 1 as this module uses it, and registers that the system keeps.
#[cfg(target_arch = "x86_64")]
#[allow(unused_unsafe, reason = "the intrinsics are unsafe up to some Rust version")]
fn cpu_has_amx() -> bool {
    if !is_x86_feature_detected!("xsave") {
        return false;
    }
    // SAFETY: the CPU must have the instruction, as every 64-bit one has.
    if unsafe { __cpuid(0) }.eax < 0x1d {
        return false;
    }
    // SAFETY: as above.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    let (tile, int8) = (features >> 24 & 1 == 1, features >> 25 & 1 == 1);
    // SAFETY: as above.
    let palette = unsafe { __cpuid_count(0x1d, 1) };
    let (row_bytes, registers, rows) = (palette.ebx & 0xffff, palette.ebx >> 16, palette.ecx & 0xffff);
    // SAFETY: the CPU must have XSAVE and the system have enabled it, which is what the detection above asks for.
    let kept = unsafe { _xgetbv(0) };
    tile && int8 && (row_bytes, registers, rows) == (64, 8, 16) && kept >> 17 & 0b11 == 0b11
}

/// Asks Linux to let this process use the tile registers; other systems are not asked, and AMX is not used there.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn system_permits_amx() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILE_DATA: u64 = 18;
    let result: i64;
    // SAFETY: a system call by number, with two numbers: it touches no memory of the process. The registers that system calls change are
    // declared as written. Before Linux 5.16 it is an error without effect.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn system_permits_amx() -> bool {
    false
}

/// Compares the instructions' unpacked signs and products with those of the plain loops, for a full group of vectors and a small one.
///
/// # Safety
/// The CPU must have AVX-512 with GFNI and AMX, and the process be allowed to use it.
#[cfg(target_arch = "x86_64")]
unsafe fn self_check() -> bool {
    let mut state = 1u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    let halves: [Lines; 2] = std::array::from_fn(|_| Lines([[0; 64]; PASS_LINES].map(|line| line.map(|_| byte()))));
    let mut codes = Codes::default();
    for tile in codes.high.iter_mut().chain(&mut codes.low) {
        *tile = Tile(std::array::from_fn(|_| std::array::from_fn(|_| byte() as i8)));
    }
    [VECTORS, 5].into_iter().all(|vectors| {
        let mut plain = Tiles::Plain.configure(vectors);
        halves.iter().enumerate().for_each(|(half, lines)| plain.unpack(half, lines, std::ptr::null(), 0));
        plain.multiply(&codes);
        let mut amx = Tiles::Amx(Proof(())).configure(vectors);
        halves.iter().enumerate().for_each(|(half, lines)| amx.unpack(half, lines, std::ptr::null(), 0));
        amx.multiply(&codes);
        let sums = |c: &Configured| c.products.0.map(|p| p.map(|s| s.0));
        amx.unit.0.iter().flatten().zip(plain.unit.0.iter().flatten()).all(|(a, b)| a.0 == b.0)
            && sums(&amx) == sums(&plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u32) -> impl FnMut() -> u32 {
        let mut state = seed;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        }
    }

    #[test]
    fn codes_are_within_half_a_step_and_what_they_cannot_represent_is_refused() {
        let mut random = random(1);
        let z: [f32; PASS_COLS] = std::array::from_fn(|_| random() as f32 / 8_388_608.0 - 1.0);
        let mut codes = Codes::default();
        let step = Tiles::Plain.encode(&z, &mut codes, 3).unwrap();
        for (c, z) in z.iter().enumerate() {
            let code = |tiles: &[Tile; PHASES]| i32::from(tiles[c % 8].0[3][c / 8]);
            let value = (256 * code(&codes.high) + code(&codes.low)) as f32 * step;
            // Half a step, and the rounding of two products in f32.
            assert!((value - z).abs() <= step * 0.51, "column {c}: {value}, not {z}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut z = z;
            z[200] = bad;
            assert_eq!(Tiles::Plain.encode(&z, &mut codes, 0), None);
        }
        assert_eq!(Tiles::Plain.encode(&z.map(|z| z * 1e-31), &mut codes, 0), None);
        assert_eq!(Tiles::Plain.encode(&[0.0; PASS_COLS], &mut codes, 0), Some(0.0));
    }

    /// Where there is AVX-512 without AMX, all but the tile instructions can be tested.
    #[cfg(target_arch = "x86_64")]
    #[test]
    #[expect(clippy::print_stderr, reason = "says when it does not run")]
    fn avx512_unpacks_encodes_and_adds_as_the_plain_loops_do() {
        if !Isa::Avx512Vnni.is_available() {
            eprintln!("skipped: this CPU has no {}", Isa::Avx512Vnni);
            return;
        }
        let mut random = random(2);
        let lines = Lines([[0; 64]; PASS_LINES].map(|line| line.map(|_| random() as u8)));
        let zero = [Tile([[0; 64]; 16]); PHASES];
        let (mut plain, mut vectors) = (zero, zero);
        unpack(&lines, &mut plain);
        // SAFETY: the only obligation is the target features, which the CPU has, as asked above.
        unsafe { unpack_avx512(&lines, std::ptr::null(), 0, &mut vectors) };
        assert_eq!(vectors.map(|tile| tile.0), plain.map(|tile| tile.0));
        let z: [f32; PASS_COLS] = std::array::from_fn(|_| random() as f32 - 8_388_608.0);
        let (mut plain, mut vectors) = (Codes::default(), Codes::default());
        // SAFETY: the only obligation is the target features, which the CPU has, as asked above.
        let step = unsafe { encode_avx512(&z, &mut vectors, 15) };
        assert_eq!(step, encode(&z, &mut plain, 15));
        let bytes = |codes: &Codes| [codes.high, codes.low].map(|tiles| tiles.map(|tile| tile.0));
        assert_eq!(bytes(&vectors), bytes(&plain));

        let sums =
            |random: &mut dyn FnMut() -> u32| Sums([[0; 16]; 16].map(|row| row.map(|_| random() as i32 % 60_000)));
        let products = Products([[0; 2]; 2].map(|part| part.map(|_| sums(&mut random))));
        let u: Vec<f32> = (0..21).map(|r| r as f32 - 9.0).collect();
        let (mut plain, mut vectors) = (vec![1.0; 21], vec![1.0; 21]);
        add(&products, 7, 0.125, &u, &mut plain);
        // SAFETY: the only obligation is the target features, which the CPU has, as asked above.
        unsafe { add_avx512(&products, 7, 0.125, &u, &mut vectors) };
        assert_eq!(vectors, plain);
    }
}
