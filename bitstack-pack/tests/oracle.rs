//! Every isa against the portable one, that one against an oracle of one line, and both against bitvec.
#![expect(clippy::print_stdout, reason = "a test that cannot run here says so")]

use bitstack_pack::{Isa, SignMatrix, SignView, pack_into_at, packed_len, row_bytes};

/// Lane widths (8, 16), their runs (32, 64), one less, one more, several with a tail, and odd sizes. Under Miri only those up
/// to a run and a tail: it is a thousand times slower.
const COLS: &[usize] = if cfg!(miri) {
    &[0, 1, 7, 8, 9, 16, 17, 39, 81]
} else {
    &[
        0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 24, 25, 31, 32, 33, 47, 48, 63, 64, 65, 71, 79, 80, 127, 128, 129, 255, 257,
        1000,
    ]
};
const ROWS: &[usize] = if cfg!(miri) { &[0, 1, 3] } else { &[0, 1, 2, 3, 5, 8] };
/// Starts that are off every vector's alignment, in elements.
const STARTS: &[usize] = if cfg!(miri) { &[0, 1] } else { &[0, 1, 2, 3, 5, 7, 11, 13] };

const GUARD: usize = 80;
const POISON_BYTE: u8 = 0xa5;
const POISON: f32 = 12345.0;

/// Awkward values whose period is prime, so that swapped blocks do not look right.
fn painted(len: usize) -> Vec<f32> {
    let special = [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MIN_POSITIVE, -1e-45, 1e-45];
    (0..len)
        .map(|i| match (i * i + 7 * i + 3) % 61 {
            k if k < special.len() => special[k],
            k => (k as f32 - 34.5) * 0.37,
        })
        .collect()
}

fn is_plus(value: f32) -> bool {
    value >= 0.0
}

fn naive_sign(value: f32) -> f32 {
    if is_plus(value) { 1.0 } else { -1.0 }
}

fn naive_pack(cols: usize, values: &[f32]) -> Vec<u8> {
    let rows = values.len().checked_div(cols).unwrap_or(0);
    let mut bytes = vec![0; rows * row_bytes(cols)];
    for (i, &value) in values.iter().enumerate() {
        bytes[i / cols * row_bytes(cols) + i % cols / 8] += u8::from(is_plus(value)) * 2u8.pow((i % cols % 8) as u32);
    }
    bytes
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Calls `check` with every instruction set of this CPU, and says which ones it lacks and so were not tested.
fn for_each_isa(check: impl Fn(Isa)) {
    for isa in Isa::ALL {
        if isa.is_available() {
            check(isa);
        } else {
            println!("skipped: {isa}, because this CPU (or Miri) does not have its instructions");
        }
    }
}

fn for_each_case(check: impl Fn(usize, usize, usize)) {
    for &cols in COLS {
        for &rows in ROWS {
            for &start in STARTS {
                check(rows, cols, start);
            }
        }
    }
}

#[test]
fn levels_are_ordered_and_scalar_is_always_available() {
    let available: Vec<Isa> = Isa::available().collect();
    assert_eq!(available[0], Isa::Scalar);
    assert_eq!(available.last(), Some(&Isa::detect()));
    assert_eq!(available, Isa::ALL[..available.len()]);
}

#[test]
fn packing_matches_the_oracle_and_writes_nothing_else() {
    for_each_isa(|isa| {
        for_each_case(|rows, cols, start| {
            let n = rows * cols;
            let values = painted(start + n);
            let values = &values[start..];
            let expected = naive_pack(cols, values);

            let mut buffer = vec![POISON_BYTE; start + expected.len() + GUARD];
            pack_into_at(isa, rows, cols, values, &mut buffer[start..][..expected.len()]).unwrap();
            let (before, rest) = buffer.split_at(start);
            let (packed, after) = rest.split_at(expected.len());
            assert_eq!(packed, expected, "{isa} {rows} x {cols} from {start}");
            assert!(before.iter().chain(after).all(|&b| b == POISON_BYTE), "{isa} {rows} x {cols} from {start}");
        });
    });
}

#[test]
fn unpacking_matches_the_oracle_and_writes_nothing_else() {
    for_each_isa(|isa| {
        for_each_case(|rows, cols, start| {
            let n = rows * cols;
            let values = painted(n);
            let expected: Vec<f32> = values.iter().copied().map(naive_sign).collect();
            let mut bytes = vec![POISON_BYTE; start];
            bytes.extend(naive_pack(cols, &values));
            let view = SignView::new(rows, cols, &bytes[start..]).unwrap();

            let mut buffer = vec![POISON; start + n + GUARD];
            view.unpack_into_at(isa, &mut buffer[start..][..n]).unwrap();
            assert_eq!(buffer[start..][..n], expected, "{isa} {rows} x {cols} from {start}");
            buffer[start..][..n].fill(POISON);
            assert!(buffer.iter().all(|&x| x == POISON), "{isa} {rows} x {cols} from {start}");

            for row in 0..rows {
                view.unpack_row_into_at(isa, row, &mut buffer[start..][..cols]);
                assert_eq!(buffer[start..][..cols], expected[row * cols..][..cols], "{isa} row {row} of {cols}");
                buffer[start..][..cols].fill(POISON);
                assert!(buffer.iter().all(|&x| x == POISON), "{isa} row {row} of {cols}");
            }
        });
    });
}

#[test]
fn applying_a_row_flips_exactly_the_sign_bits() {
    for_each_isa(|isa| {
        for_each_case(|rows, cols, start| {
            // The signs are those of other values than the ones they are applied to, NaNs among both.
            let signs = painted(rows * cols + 17).split_off(17);
            let bytes = naive_pack(cols, &signs);
            let view = SignView::new(rows, cols, &bytes).unwrap();
            for row in 0..rows {
                let values = painted(cols);
                let expected: Vec<u32> = (0..cols)
                    .map(|c| values[c].to_bits() ^ if is_plus(signs[row * cols + c]) { 0 } else { 0x8000_0000 })
                    .collect();
                let mut buffer = vec![POISON; start + cols + GUARD];
                buffer[start..][..cols].copy_from_slice(&values);
                view.apply_row_at(isa, row, &mut buffer[start..][..cols]);
                assert_eq!(bits(&buffer[start..][..cols]), expected, "{isa} row {row} of {cols} from {start}");
                buffer[start..][..cols].fill(POISON);
                assert!(buffer.iter().all(|&x| x == POISON), "{isa} row {row} of {cols} from {start}");
            }
        });
    });
}

#[test]
fn every_pair_of_bytes_unpacks_to_its_bits() {
    let step = if cfg!(miri) { 4099 } else { 1 };
    for_each_isa(|isa| {
        for word in (0..=u16::MAX).step_by(step) {
            let bytes = word.to_le_bytes();
            let view = SignView::new(1, 16, &bytes).unwrap();
            let mut values = [POISON; 16];
            view.unpack_row_into_at(isa, 0, &mut values);
            for (j, &value) in values.iter().enumerate() {
                assert_eq!(value, if word >> j & 1 == 1 { 1.0 } else { -1.0 });
                assert_eq!(view.get(0, j), value);
            }
            let mut packed = [POISON_BYTE; 2];
            pack_into_at(isa, 1, 16, &values, &mut packed).unwrap();
            assert_eq!(packed, bytes);
        }
    });
}

#[test]
fn public_functions_agree_with_get() {
    for_each_case(|rows, cols, _| {
        let values = painted(rows * cols);
        let signs = SignMatrix::from_f32(rows, cols, &values).unwrap();
        assert_eq!(signs.as_bytes().len(), packed_len(rows, cols).unwrap());
        assert_eq!((signs.rows(), signs.cols()), (rows, cols));
        let view = signs.view();
        let unpacked = view.unpack().unwrap();
        for row in 0..rows {
            let mut ones = vec![1.0; cols];
            view.apply_row(row, &mut ones);
            let mut out = vec![POISON; cols];
            view.unpack_row_into(row, &mut out);
            for col in 0..cols {
                assert_eq!(view.get(row, col), naive_sign(values[row * cols + col]));
                assert_eq!(view.get(row, col), unpacked[row * cols + col]);
                assert_eq!(view.get(row, col), out[col]);
                assert_eq!(view.get(row, col), ones[col]);
            }
        }
        assert_eq!(SignMatrix::from_f32(rows, cols, &unpacked).unwrap(), signs);
        assert_eq!(view.to_owned(), signs);
        assert_eq!(SignMatrix::from_bytes(rows, cols, signs.clone().into_bytes()).unwrap(), signs);
    });
}

#[test]
fn zeros_are_plus_and_nans_are_minus() {
    let values = [0.0, -0.0, f32::NAN, -f32::NAN, 1e-45, -1e-45];
    let signs = SignMatrix::from_f32(1, 6, &values).unwrap();
    assert_eq!(signs.view().unpack().unwrap(), [1.0, 1.0, -1.0, -1.0, 1.0, -1.0]);
}

// bitvec does not pass Miri, and proptest would take minutes in it.
#[cfg(not(miri))]
mod properties {
    use bitvec::order::Lsb0;
    use bitvec::slice::BitSlice;
    use bitvec::vec::BitVec;
    use proptest::prelude::*;

    use super::*;

    fn matrix() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
        (0usize..6, 0usize..200).prop_flat_map(|(rows, cols)| {
            let values = proptest::collection::vec(any::<u32>().prop_map(f32::from_bits), rows * cols);
            (Just(rows), Just(cols), values)
        })
    }

    proptest! {
        #[test]
        fn bitvec_gives_the_same_bytes((rows, cols, values) in matrix()) {
            let signs = SignMatrix::from_f32(rows, cols, &values).unwrap();
            for row in 0..rows {
                let mut oracle: BitVec<u8, Lsb0> = values[row * cols..][..cols].iter().map(|&v| is_plus(v)).collect();
                oracle.set_uninitialized(false);
                prop_assert_eq!(&*signs.view().row(row), oracle.as_raw_slice());
                let bits = &BitSlice::<u8, Lsb0>::from_slice(oracle.as_raw_slice())[..cols];
                prop_assert!(bits.iter().by_vals().eq((0..cols).map(|c| signs.view().get(row, c) == 1.0)));
                #[cfg(feature = "bitvec")]
                prop_assert_eq!(&*signs.view().row_bits(row), bits);
            }
        }

        #[test]
        fn levels_agree_on_any_bits((rows, cols, values) in matrix()) {
            let scalar = naive_pack(cols, &values);
            let view = SignView::new(rows, cols, &scalar).unwrap();
            for isa in Isa::available() {
                let mut bytes = vec![POISON_BYTE; scalar.len()];
                pack_into_at(isa, rows, cols, &values, &mut bytes).unwrap();
                prop_assert_eq!(&bytes, &scalar);
                for row in 0..rows {
                    // Twice by the same signs is the identity, to the bit and for NaNs too.
                    let row_values = &values[row * cols..][..cols];
                    let mut applied = row_values.to_vec();
                    view.apply_row_at(isa, row, &mut applied);
                    let mut expected = row_values.to_vec();
                    view.apply_row_at(Isa::Scalar, row, &mut expected);
                    prop_assert_eq!(bits(&applied), bits(&expected));
                    view.apply_row_at(isa, row, &mut applied);
                    prop_assert_eq!(bits(&applied), bits(row_values));
                }
            }
        }

        #[test]
        fn the_reference_layout_round_trips((rows, cols, values) in matrix()) {
            let signs = SignMatrix::from_f32(rows, cols, &values).unwrap();
            let flat = signs.view().to_reference_bytes();
            prop_assert_eq!(flat.len(), (rows * cols).div_ceil(8));
            prop_assert_eq!(SignMatrix::from_reference_bytes(rows, cols, &flat).unwrap(), signs);
        }
    }
}
